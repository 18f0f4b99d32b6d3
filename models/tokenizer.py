"""Tokenizers: a byte-level BPE trained on one's own text, and the loading of any that lies beside a model.

Special ids are Mixtral's: `<unk>` 0, `<s>` 1, `</s>` 2. Encoding puts `<s>` in front, as Mixtral's tokenizer does.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL_TOKENS = (UNK, BOS, EOS)  # in the order of their ids: 0, 1, 2

_FILES = ("tokenizer.json", "tokenizer.model")  # a fast tokenizer, a SentencePiece model


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, the 3 special tokens and the 256 bytes among them.

    Byte-level: any text encodes, and decodes to itself. Deterministic in the texts and their order.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} cannot hold the special tokens and all bytes; use >= {smallest}")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, max_length: int | None = None) -> None:
    """Write `tokenizer.json` and the settings by which `transformers.AutoTokenizer` opens it as a fast tokenizer.

    `max_length` is the longest text in tokens that the model beside it takes.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    written = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
    }
    for name, content in written.items():  # each whole or not at all
        temporary = folder / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / name)


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that lies in a model's directory, fast or SentencePiece; None if it has none.

    Only files of that directory are read; code that it may bring is never run.

    Raises:
      ValueError: there is a tokenizer but it cannot be opened; names the directory and the cause.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in _FILES):
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"{folder}: the tokenizer cannot be opened ({type(error).__name__}: {error}); "
            f"replace its {' or '.join(_FILES)} by the ones published with the model"
        ) from error
