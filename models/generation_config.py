"""What a checkpoint says of generation: the ids that begin, end and pad a text, and how it wants to be sampled.

As in transformers 5, `generation_config.json` alone says it where there is one, and `config.json` where there is none.
The ids decide when a text ends. The sampling is a recommendation: `Model.generate` is greedy unless its caller passes
`sampling`, for example `model.generation.sampling`, so that a run without arguments can be repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from models.config import ConfigError, MoEConfig
from models.fields import COUNT, FLAG, POSITIVE, TOKEN, TOKENS, Kind, is_integer, is_number, read_object, wrong_types
from models.generation import Sampling

GENERATION_FILE = "generation_config.json"

_KINDS: dict[str, Kind] = {
    "bos_token_id": TOKEN.or_null(),
    "eos_token_id": TOKENS.or_null(),
    "pad_token_id": TOKEN.or_null(),
    "do_sample": FLAG.or_null(),
    "temperature": POSITIVE.or_null(),
    "top_k": COUNT.or_null(),
    "top_p": Kind("a number above 0 and up to 1", lambda value: is_number(value) and 0 < value <= 1).or_null(),
}
_USUAL_TOP_K = 50  # of transformers, where a file that asks for sampling does not name it; 0 is all tokens
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


def read_generation(directory: Path) -> GenerationDefaults:
    """What the checkpoint in `directory` says of generation.

    Raises:
        ConfigError: the file cannot be read, or one of its fields has a value of a wrong type; names file and fields.
    """
    path = directory / GENERATION_FILE
    if not path.exists():
        path = directory / "config.json"
    fields = read_object(path, ConfigError)
    if is_integer(pad := fields.get("pad_token_id")) and pad < 0:
        fields["pad_token_id"] = None  # published files say -1 where there is none
    if wrong := wrong_types(fields, _KINDS):
        raise ConfigError(f"{path}: {'; '.join(wrong)}; correct the file or fetch it again")
    ends = fields.get("eos_token_id")
    return GenerationDefaults(
        begin_id=fields.get("bos_token_id"),
        end_ids=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        pad_id=fields.get("pad_token_id"),
        sampling=_sampling(fields),
        not_applied=tuple(name for name, usual in _NOT_APPLIED.items() if fields.get(name, usual) not in (usual, None)),
    )


def _sampling(fields: dict[str, Any]) -> Sampling:
    if not fields.get("do_sample"):
        return GREEDY
    top_k = _USUAL_TOP_K if fields.get("top_k") is None else fields["top_k"]
    temperature = 1.0 if fields.get("temperature") is None else fields["temperature"]
    return Sampling(float(temperature), top_k or None, fields.get("top_p"))
