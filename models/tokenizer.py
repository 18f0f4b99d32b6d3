"""Tokenizers: training a byte-level BPE, and loading the tokenizer of any checkpoint.

Special ids are the same as Mixtral's: `<unk>` 0, `<s>` 1, `</s>` 2. Encoding puts `<s>` in front of a text.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from models.fields import read_object
from varjax.errors import InputError
from varjax.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL_TOKENS = (UNK, BOS, EOS)  # in the order of their ids: 0, 1, 2

_FAST, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # read together with `_FAST`
# Texts on which conversions fail.
_PROBES = ("Hello world", "  two  spaces\n\t" + 29 * " ", "\u4e2d\u6587 \U00013000")


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE, which encodes any text and decodes it to itself.

    Args:
        texts: the training texts; the result is deterministic in them and their order.
        vocab_size: number of entries, including the 3 special tokens and the 256 bytes.

    Returns:
        The tokenizer.

    Raises:
        InputError: the vocabulary cannot hold the special tokens and all bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise InputError(f"vocab_size {vocab_size} cannot hold the special tokens and all bytes; use >= {smallest}")
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
    tokenizer.post_processor = _bos_in_front(tokenizer)
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer,
    directory: str | Path,
    max_length: int | None = None,
    special_tokens: tuple[str, str, str] = SPECIAL_TOKENS,
) -> None:
    """Write a tokenizer so that `transformers.AutoTokenizer` opens it.

    Args:
        tokenizer: a byte-level BPE, such as one from `train_bpe`.
        directory: the folder of the model.
        max_length: the longest text, in tokens, that the model takes; None: not stated.
        special_tokens: the tokens for unknown text, begin and end.
    """
    folder = Path(directory)
    unknown, begin, end = special_tokens
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    written = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
    }
    for name, content in written.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer of a checkpoint as a fast one.

    `tokenizer.json` is preferred; a `tokenizer.model` alone (SentencePiece BPE, such as Llama's and Mixtral's) is
    converted exactly. Only files of the directory are read, and code in it is never run.

    Args:
        directory: the folder of the checkpoint.

    Returns:
        The tokenizer; None if there is none.

    Raises:
        InputError: there is a tokenizer but it cannot be opened; names the file and the cause.
    """
    folder = Path(directory)
    if (folder / _FAST).is_file():
        transformers = _transformers()
        for name in _SETTINGS:
            if (folder / name).exists():
                read_object(folder / name, InputError)
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds
            raise InputError(
                f"{folder / _FAST}: the tokenizer cannot be opened ({type(error).__name__}: {error}); "
                "replace it and tokenizer_config.json with the ones published with the model"
            ) from error
    if (folder / _SENTENCEPIECE).is_file():
        return _from_sentencepiece(folder / _SENTENCEPIECE)
    return None


def _from_sentencepiece(path: Path) -> "PreTrainedTokenizerBase":
    """A SentencePiece BPE model as a fast tokenizer with `<s>` in front.

    transformers' own conversion needs protobuf and, without a tokenizer_config.json, gives other ids for runs of spaces
    and no `<s>`. The result is compared with SentencePiece itself before it is returned.
    """
    import sentencepiece

    transformers = _transformers()
    try:
        source = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error}); download it again") from error
    vocab = {source.id_to_piece(i): i for i in range(len(source))}
    # Every way to make a piece from two, the piece with the best score first. SentencePiece merges equal scores (runs
    # of spaces) from the left: the longest left part first.
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-source.get_score(i), -cut, left, (piece[:cut], piece[cut:])))
    fast = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair for *_, pair in sorted(merges)],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = "\u2581"  # SentencePiece writes a space as a lower one eighth block, and one before the text
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if any(fast.encode(text).ids != source.encode(text) for text in _PROBES):
        raise InputError(
            f"{path}: this kind of SentencePiece model (unigram, or with its own normalization) cannot be "
            f"converted exactly; put the model's {_FAST} next to it"
        )
    fast.post_processor = _bos_in_front(fast)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _transformers() -> ModuleType:
    """transformers, without its advice to install PyTorch, which its tokenizers do not need."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.setdefault(quiet, "")
    os.environ[quiet] = "1"
    try:
        import transformers
    finally:
        os.environ[quiet] = before
    return transformers


def _bos_in_front(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
