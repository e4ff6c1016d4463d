"""xLSTM with matrix memories (mLSTM blocks, as in xLSTM-7B)."""
