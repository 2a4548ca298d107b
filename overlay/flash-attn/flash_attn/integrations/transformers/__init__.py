"""Run the models of Hugging Face's transformers without softmax.

    from flash_attn.integrations.transformers import register

    register("flash_no_softmax", activation="relu", normalization="1/visible")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_no_softmax")

    registry.py   register and registered
    score.py      the score function of a registered name, as model.config keeps it
    versions.py   which transformers are supported
    masks.py      transformers' masks, as the sequences that they describe
    attention.py  the attention function that models call
    models.py     what happens when a model is made: keep the score function in its config, refuse, warn
    loader.py     the one private function of transformers that is replaced, and why

docs/transformers.md says which ways of calling a model are supported.
"""

from .registry import register, registered

__all__ = ["register", "registered"]
