"""The stages by name, in the order in which they are trained."""

from vgpt_jax.training import classifier_stage, generator_stage, tokenizer_stage

STAGES = {"tokenizer": tokenizer_stage, "generator": generator_stage, "classifier": classifier_stage}
