"""The language model's part of a config.json whose model also sees, hears or speaks."""

from apportion.catalog.config_fields import ConfigFields

_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "language_model_config")
_OF_THE_WHOLE = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "quantization")
"""Fields that stand in the whole config and hold for its parts."""


def language_fields(fields: ConfigFields) -> ConfigFields:
    """The fields themselves where there is no such part. Raises ModelError."""
    whole = fields.all()
    for name in _PARTS:
        part = fields.mapping(name)
        if part:
            shared = {key: whole[key] for key in _OF_THE_WHOLE if whole.get(key) is not None}
            return language_fields(ConfigFields(fields.file, shared | part, {}))
    return fields
