"""Importing rnnzoo costs nothing, and the Auto classes know its models all the same."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import rnnzoo  # noqa: F401
from rnnzoo.zoo.core.registry import architectures, config_class


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_transformers():
    assert in_a_fresh_process(
        "import sys, rnnzoo; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    ) == ("[]\n")


ORDERS = {
    "rnnzoo first": "import rnnzoo\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport rnnzoo",
    "half of it first": "from transformers import AutoConfig\nimport rnnzoo\n"
    "from transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_the_zoo_in_any_order_of_imports_and_load_only_what_is_asked_for(order):
    said = in_a_fresh_process(
        ORDERS[order]
        + """
import sys
config = AutoConfig.for_model("rnnzoo-gla", vocab_size=7, hidden_size=32, num_hidden_layers=1)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
print(sorted(m.rsplit(".")[-1] for m in sys.modules if m.startswith("rnnzoo.zoo.") and ".modeling_" in m))
"""
    )
    assert said == "GLAForCausalLM\n['modeling_gla']\n"


def test_without_registration_transformers_is_as_it_was():
    said = in_a_fresh_process(
        "import os; os.environ['RNNZOO_NO_REGISTER'] = '1'\nimport rnnzoo\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING as m\nprint('rnnzoo-gla' in m)\n"
        "from rnnzoo.zoo import register_auto_classes as r; r(); r(); print('rnnzoo-gla' in m)"
    )
    assert said == "False\nTrue\n"


def test_a_module_that_is_looked_for_or_imported_again_is_changed_all_the_same():
    said = in_a_fresh_process("""
import copy, importlib, importlib.util, inspect, pickle, sys
import rnnzoo
names = ["configuration_utils", "models.auto.configuration_auto", "models.auto.modeling_auto"]
names = [f"transformers.{name}" for name in names]
for name in names * 2:
    spec = importlib.util.find_spec(name)
    assert copy.copy(spec.loader).get_source(name) == spec.loader.get_source(name) and name in repr(spec)
import transformers
from transformers.models.auto import configuration_auto
assert transformers.PreTrainedConfig(layer_types=["gla", "based.convolution"], num_hidden_layers=2)
assert "rnnzoo-gla" in configuration_auto.CONFIG_MAPPING and transformers.AutoModel
for name in names:
    module = sys.modules[name]
    assert type(module.__loader__) is type(module.__spec__.loader) is type(copy.__loader__)
    assert inspect.getsource(module) and pickle.loads(pickle.dumps(module.__spec__)) == module.__spec__
importlib.reload(configuration_auto)
print("rnnzoo-gla" in configuration_auto.CONFIG_MAPPING)
""")
    assert said == "True\n"


OTHERS = {
    "somebody's finder comes first": """
import rnnzoo
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path) if name.endswith("_auto") else None
sys.meta_path.insert(0, Finder)
from transformers import AutoConfig, AutoModelForCausalLM
""",
    "two threads": """
import threading
def other():
    from transformers import AutoModelForCausalLM
threads = [threading.Thread(target=other), threading.Thread(target=importlib.import_module, args=["rnnzoo"])]
for thread in threads: thread.start()
for thread in threads: thread.join()
from transformers import AutoConfig, AutoModelForCausalLM
""",
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_others_do_with_imports_does_not_matter(case):
    code = f"import importlib, importlib.machinery, sys\n{OTHERS[case]}"
    code += "config = AutoConfig.for_model('rnnzoo-gla', vocab_size=7, hidden_size=32, num_hidden_layers=1)\n"
    code += "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    assert in_a_fresh_process(code) == "GLAForCausalLM\n"


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_found_by_its_model_type(name):
    cls = config_class(name)
    assert CONFIG_MAPPING[cls.model_type] is cls
    config = cls(vocab_size=7, hidden_size=32, num_hidden_layers=1)
    for auto, suffix in (
        (transformers.AutoModel, "Model"),
        (transformers.AutoModelForCausalLM, "ForCausalLM"),
        (transformers.AutoModelForSequenceClassification, "ForSequenceClassification"),
    ):
        assert cls in auto._model_mapping
        assert type(auto.from_config(config)).__name__ == cls.__name__.removesuffix("Config") + suffix


def test_the_mappings_list_copy_and_pickle_like_any_dictionary():
    names = {f"rnnzoo-{name}" for name in architectures()}
    assert names <= set(CONFIG_MAPPING.keys())
    assert {config_class(name) for name in architectures()} <= set(CONFIG_MAPPING._extra_content.values())
    found = {cls.__name__ for cls in MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.values()}
    assert {"Mamba2ForCausalLM", "RWKV7ForCausalLM"} <= found
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content) >= len(names)
    assert names <= set(pickle.loads(pickle.dumps(CONFIG_MAPPING)).keys())
    assert names <= set(copy.deepcopy(CONFIG_MAPPING._extra_content))


def test_models_of_others_can_still_be_added():
    class OwnConfig(transformers.PreTrainedConfig):
        model_type = "somebodys-own"

    class OwnModel(transformers.PreTrainedModel):
        config_class = OwnConfig

    transformers.AutoConfig.register("somebodys-own", OwnConfig)
    transformers.AutoModel.register(OwnConfig, OwnModel)
    assert transformers.AutoModel._model_mapping[OwnConfig] is OwnModel
    assert type(transformers.AutoConfig.for_model("somebodys-own")) is OwnConfig
