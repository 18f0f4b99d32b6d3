"""What a checkpoint says of generation: the ids that begin, end and pad a text, and how it wants to be sampled.

As in transformers, `generation_config.json` alone says it where there is one. Where there is none, the ids are those of
the architecture, where what `config.json` leaves out is the family's default; so does transformers'
`GenerationConfig.from_model_config`. (`from_pretrained` of transformers 5.24 reads the bare `config.json` there: with
it, a text whose end id is such a default does not end.)

The ids decide when a text ends. The sampling is a recommendation: `Model.generate` is greedy unless its caller passes
`sampling`, for example `model.generation.sampling`, so that a run without arguments can be repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from models.config import TOKEN_IDS, ConfigError, MoEConfig
from models.fields import (
    FLAG,
    TOKEN,
    TOKENS,
    Kind,
    ids_of,
    is_integer,
    is_number,
    read_object,
    without_negative_ids,
    wrong_types,
)
from models.generation import Sampling

GENERATION_FILE = "generation_config.json"

_NUMBER = Kind("a number", is_number).or_null()
_KINDS: dict[str, Kind] = {
    "bos_token_id": TOKEN.or_null(),
    "eos_token_id": TOKENS.or_null(),
    "pad_token_id": TOKEN.or_null(),
    "do_sample": FLAG.or_null(),
    "temperature": _NUMBER,
    "top_k": Kind("an integer", is_integer).or_null(),
    "top_p": _NUMBER,
}
_USUAL_TOP_K = 50  # of transformers, where a file that asks for sampling does not name it; 0 or less is all tokens
# Settings with which transformers chooses other tokens and which `Sampling` lacks, and the value that changes nothing.
_NOT_APPLIED: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint wants its texts to begin, to end and to be sampled."""

    begin_id: int | None
    end_ids: tuple[int, ...]  # a text ends with any of these; empty: texts do not end
    pad_id: int | None
    sampling: Sampling = GREEDY  # the recommendation; greedy where the checkpoint asks for no sampling
    not_applied: tuple[str, ...] = ()  # other settings of the file that would change what transformers generates

    @classmethod
    def of(cls, config: MoEConfig) -> GenerationDefaults:
        """Those of an architecture alone, for a model that comes from no file."""
        return cls(config.bos_token_id, config.eos_token_ids, config.pad_token_id)

    @property
    def token_ids(self) -> frozenset[int]:
        """All ids named here."""
        return frozenset({self.begin_id, self.pad_id, *self.end_ids} - {None})  # type: ignore[arg-type]


def read_generation(directory: Path, config: MoEConfig) -> GenerationDefaults:
    """What the checkpoint in `directory`, whose architecture is `config`, says of generation.

    A recommendation that cannot be followed does not make a checkpoint unusable: it is listed in `not_applied`.

    Raises:
        ConfigError: the file cannot be read, or one of its fields has a value of a wrong type; names file and fields.
    """
    own = (directory / GENERATION_FILE).exists()
    path = directory / (GENERATION_FILE if own else "config.json")
    fields = read_object(path, ConfigError)
    fields |= {name: without_negative_ids(fields.get(name)) for name in TOKEN_IDS}
    if wrong := wrong_types(fields, _KINDS):
        raise ConfigError(f"{path}: {'; '.join(wrong)}; correct the file or fetch it again")
    sampling, impossible = _sampling(fields)
    unknown = [name for name, usual in _NOT_APPLIED.items() if fields.get(name, usual) not in (usual, None)]
    if own:
        found = GenerationDefaults(fields["bos_token_id"], ids_of(fields["eos_token_id"]), fields["pad_token_id"])
    else:
        found = GenerationDefaults.of(config)
    return dataclasses.replace(found, sampling=sampling, not_applied=(*impossible, *unknown))


def generation_to_hf(generation: GenerationDefaults) -> dict[str, Any]:
    """The fields of a `generation_config.json`: the ids and the sampling, without the settings that are not applied."""
    fields: dict[str, Any] = {
        "bos_token_id": generation.begin_id,
        "eos_token_id": list(generation.end_ids) or None,
        "pad_token_id": generation.pad_id,
    }
    sampling = generation.sampling
    if sampling.temperature:
        named = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
        fields |= {"do_sample": True, **named}
    return {name: value for name, value in fields.items() if value is not None}


def _sampling(fields: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """What the fields recommend, and the names of those whose value is out of range."""
    impossible = []
    temperature, top_k, top_p = (fields.get(name) for name in ("temperature", "top_k", "top_p"))
    if temperature is not None and temperature < 0:
        impossible.append("temperature")
        temperature = None
    if top_p is not None and not 0 < top_p <= 1:
        impossible.append("top_p")
        top_p = None
    if not fields.get("do_sample") or temperature == 0:
        return GREEDY, impossible
    top_k = _USUAL_TOP_K if top_k is None else max(top_k, 0) or None
    return Sampling(1.0 if temperature is None else float(temperature), top_k, top_p), impossible
