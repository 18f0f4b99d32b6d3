"""A loaded checkpoint: architecture, parameters, tokenizer, and the engine that runs its experts.

Letters: B sequences, T positions, L layers with experts, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.config import MoEConfig, read_config, read_dtype
from models.decoder import Network, Output
from models.experts import Engine, get_engine
from models.generation import (
    GREEDY,
    TOKENS_PER_DISPATCH,
    GenerationDefaults,
    Sampling,
    Step,
    generate,
    read_generation,
)
from models.kv_cache import KVCache, roomy
from models.parameters import Params, prepare
from models.placement import ONE_DEVICE, Placement
from models.tokenizer import load_tokenizer
from models.weights import CheckpointError, load_params
from varjax.errors import InputError, require_integer
from varjax.model import Generation
from varjax.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
REFERENCE = Path(__file__).parent / "reference"  # the small model that comes with this repository
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its parameters. Immutable: calling it changes nothing inside."""

    config: MoEConfig
    params: Params  # in the layout of `engine`
    engine: Engine
    name: str  # the directory or hub id that it was loaded from
    fingerprint: str  # of the checkpoint's tensors (`models.weights.load_params`)
    tokenizer: PreTrainedTokenizerBase | None = None
    placement: Placement = ONE_DEVICE  # the devices of the parameters and of everything computed from them
    generation_defaults: GenerationDefaults | None = None  # from the checkpoint's files; None: those of `config`

    def __call__(self, input_ids: Any, attention_mask: Any | None = None) -> Output:
        """Run the model on whole texts.

        Args:
            input_ids: integers [B, T].
            attention_mask: 1 for real tokens, 0 for padding, [B, T]; padding may be on either side. None: no padding.

        Returns:
            Logits float32[B, T, V], gate probabilities float32[L, B, T, E] and routing.

        Raises:
            InputError: inputs that `check_inputs` refuses.
        """
        ids, mask = self.check_inputs(input_ids, attention_mask)
        return self.network.forward(self.params, ids, attention_mask=mask)

    @cached_property
    def network(self) -> Network:
        """The pure part, which runs on any parameters of this shape. Hashable, so it can be static under jit."""
        return Network(self.config, self.engine, self.placement)

    @property
    def generation(self) -> GenerationDefaults:
        """The ids that begin, end and pad a text, and the sampling that the checkpoint recommends."""
        return self.generation_defaults or GenerationDefaults.of(self.config)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids of all files. Statistics never count them, so no key ends in one."""
        return tuple(sorted({*self.config.special_token_ids, *self.generation.token_ids}))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters and the activations."""
        return self.params["decoder"]["embed"]["embedding"].dtype

    def empty_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Make an empty key/value cache.

        Args:
            batch_size: number of sequences.
            capacity: positions per sequence, padding included.

        Returns:
            The cache, on the devices of the model.

        Raises:
            InputError: an argument is less than 1.
        """
        require_integer("batch_size", batch_size, least=1)
        require_integer("capacity", capacity, least=1)
        return KVCache.empty(self.config, batch_size, capacity, self.dtype, self.placement)

    def place(self, tree: T) -> T:
        """Move arrays to the devices of the model.

        Args:
            tree: a pytree, such as a table or a state.

        Returns:
            The pytree on the devices (`models.placement.Placement.place`); on one device, `tree` itself.
        """
        return self.placement.place(tree)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any | None = None,
        sampling: Sampling | None = None,
        step: Step | None = None,
        carry: Any = None,
        clock: Callable[[], np.int32] = np.int32,
        tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
    ) -> Generation:
        """Continue each text until it ends with one of `generation.end_ids`.

        Args:
            input_ids: integers [B, T], padded on the left where the texts differ in length.
            max_new_tokens: the largest number; after its end a text is filled with the padding id, an end id or 0.
            attention_mask: 1 for real tokens, 0 for padding, [B, T]. None: no padding.
            sampling: how tokens are chosen; None: greedy, whatever the checkpoint recommends (`generation.sampling`).
            step: runs one call of a model in place of the plain decoder (`models.generation.Step`).
            carry: the first state of `step`, which is donated.
            clock: gives `step` the time, as an int32; it is read before a dispatch, once for each of its tokens, even
                if the texts end before.
            tokens_per_dispatch: how many tokens are generated with each call from Python. A larger number saves time
                and gives the same tokens.

        Returns:
            `.tokens`, int32[B, T + new], which begin with `input_ids`, and `.state`, the last state of `step`.

        Raises:
            InputError: fewer than one new token or token per dispatch, or inputs that `check_inputs` refuses.
        """
        require_integer("max_new_tokens", max_new_tokens, least=1)
        require_integer("tokens_per_dispatch", tokens_per_dispatch, least=1)
        ids, mask = self.check_inputs(input_ids, attention_mask, going_on=True)
        batch, length = ids.shape
        ends = self.generation.end_ids
        fills = (self.generation.pad_id, *ends)
        fill = next((token for token in fills if token is not None and token < self.config.vocab_size), 0)
        kv = self.empty_cache(batch, roomy(length + max_new_tokens))
        runs: Step = step or PlainStep(self.params, self.network)
        asked = (max_new_tokens, sampling or GREEDY, ends, fill, clock, tokens_per_dispatch, self.placement)
        tokens, carry = generate(runs, kv, carry, ids, mask, *asked)
        tokens[:, :length] = input_ids  # as the caller gave them: padding may have ids outside the vocabulary
        return Generation(tokens, carry)

    def check_inputs(
        self, input_ids: Any, attention_mask: Any | None = None, *, going_on: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Check and convert the inputs of a call.

        Padding may hold any id, such as that of an added `[PAD]` token; an id outside the vocabulary becomes 0.

        Args:
            input_ids: integers [B, T].
            attention_mask: 1 for real tokens, 0 for padding, [B, T]. None: no padding.
            going_on: the texts are to be continued, so none may end in padding, except rows of padding only.

        Returns:
            int32[B, T] ids and bool[B, T] mask, on the devices of the model.

        Raises:
            InputError: a wrong shape or dtype, an id outside the vocabulary, or a mask of other values than 0 and 1.
        """
        ids = _array("input_ids", input_ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise InputError(
                f"input_ids has shape {ids.shape} and dtype {ids.dtype}; expected integers [B, T], not empty"
            )
        mask = np.ones(ids.shape, bool) if attention_mask is None else _array("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask has shape {mask.shape}; expected that of input_ids, {ids.shape}")
        if not np.isin(mask, (0, 1)).all():
            raise InputError("attention_mask holds other values than 1 for real tokens and 0 for padding")
        mask = mask.astype(bool)
        inside = (ids >= 0) & (ids < self.config.vocab_size)
        if not inside[mask].all():
            raise InputError(
                f"input_ids holds {ids[mask].min()} to {ids[mask].max()}; expected ids from 0 to "
                f"{self.config.vocab_size - 1} (is this the model's own tokenizer?)"
            )
        ids = np.where(inside, ids, 0)
        if going_on and (mask.any(axis=1) & ~mask[:, -1]).any():
            raise InputError(
                "attention_mask ends in padding; pad on the left, so that each text's last token comes last"
            )
        return self.place(to_device((ids.astype(np.int32), mask)))


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:  # NumPy's, for rows of different lengths
        raise InputError(f"{name} has rows of different lengths; pad them, on the left to continue texts") from None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainStep:
    """The step of generation (`models.generation.Step`) of the plain model."""

    params: Params  # prepared for the engine
    network: Network = dataclasses.field(metadata={"static": True})

    def __call__(
        self, kv: KVCache, carry: Any, ids: jax.Array, mask: jax.Array, now: jax.Array
    ) -> tuple[jax.Array, KVCache, Any]:
        """Run the next ids.

        Args:
            kv: the cache so far.
            carry: returned as it is.
            ids: int32[B, T].
            mask: bool[B, T], true for real tokens.
            now: not used.

        Returns:
            The logits float32[B, V] of the last position, the next cache, and `carry`.
        """
        return *plain_step(self.params, kv, ids, mask, self.network), carry


@partial(jax.jit, static_argnames="network", donate_argnames="kv")
def plain_step(
    params: Params, kv: KVCache, ids: jax.Array, mask: jax.Array, network: Network
) -> tuple[jax.Array, KVCache]:
    """Run one step of the plain model for the loops of this library, which give up the cache.

    Args:
        params: parameters prepared for the engine.
        kv: the cache, which is donated.
        ids: int32[B, T].
        mask: bool[B, T], true for real tokens.
        network: architecture, engine and devices.

    Returns:
        Logits float32[B, V] of the last position, and the cache with the new positions.
    """
    out = network.forward(params, ids, attention_mask=mask, kv=kv, last_logits_only=True)
    assert out.kv is not None  # one was passed
    return out.logits[:, -1], out.kv


def load_model(
    directory_or_hub_id: str | Path,
    dtype: str | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a checkpoint from a local directory or the Hugging Face hub.

    Args:
        directory_or_hub_id: a directory, a hub id, or "reference" for the small model of this repository.
        dtype: "float32" or "bfloat16", of the parameters and the activations; None: what the checkpoint's config says.
        implementation: name of the expert engine (`models.experts.get_engine`); None: the best one for the device.
        mesh: the devices to divide the model over (`models.placement.make_mesh`); None: one device holds all of it.

    Returns:
        The model.

    Raises:
        ConfigError: the family (`models.families.FAMILIES`) or a setting is not supported.
        CheckpointError: the weights or the tokenizer do not belong to the config, or a file is damaged.
        InputError: an unknown dtype or engine, parameters that do not fit into the memory, or a tokenizer that cannot
            be opened.
        MeshError: the model cannot be divided over the mesh.
        FileNotFoundError: neither a local directory nor a hub id that can be reached.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not supported; choose one of {sorted(DTYPES)}")
    engine = get_engine(implementation)
    directory = _resolve_directory(directory_or_hub_id)
    config = read_config(directory / "config.json")
    dtype = dtype or read_dtype(directory / "config.json")
    generation = read_generation(directory, config)
    placement = Placement.of(config, mesh)
    params, fingerprint = load_params(directory, config, DTYPES[dtype], placement)
    tokenizer = fitting_tokenizer(directory, config)
    prepared = prepare(params, engine, donate=True)
    return Model(config, prepared, engine, str(directory_or_hub_id), fingerprint, tokenizer, placement, generation)


def fitting_tokenizer(directory: Path, config: MoEConfig) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint and compare it with the vocabulary.

    Tokens that were added later, such as a `[PAD]`, may lack an embedding: `Model.check_inputs` refuses their use.

    Args:
        directory: the folder of the checkpoint.
        config: its architecture.

    Returns:
        The tokenizer; None if there is none.

    Raises:
        CheckpointError: an entry of its own vocabulary has no embedding in the model.
        InputError: the tokenizer cannot be opened.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        return None
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size}
    if beyond - tokenizer.get_added_vocab().keys():
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(tokenizer)} entries but config.json says vocab_size "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
    return tokenizer


def _resolve_directory(name: str | Path) -> Path:
    if name == "reference":
        return REFERENCE
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or str(name).count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a directory nor a hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only: nothing that could run code is fetched.
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is not a local directory and could not be fetched from the hub ({type(error).__name__}: {error}); "
            "check the name and the network, or download the checkpoint and give its directory"
        ) from error
