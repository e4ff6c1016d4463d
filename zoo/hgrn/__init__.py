"""HGRN: a gated linear RNN whose forget gates have lower bounds that rise over the layers."""
