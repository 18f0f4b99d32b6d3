"""A loaded checkpoint: architecture, parameters, tokenizer and the engine that runs its experts.

Letters: B sequences, T positions, L layers with experts, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.config import MoEConfig, read_config
from models.decoder import Network, Output
from models.experts import Engine, get_engine
from models.generation import Sampling, Step, generate
from models.generation_config import GenerationDefaults, read_generation
from models.kv_cache import KVCache
from models.parameters import Params, prepare
from models.placement import ONE_DEVICE, Placement
from models.verification import fitting_tokenizer
from models.weights import load_params
from varjax.errors import InputError, require_integer
from varjax.model import Generation
from varjax.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its parameters. Calling it is pure; nothing inside changes."""

    config: MoEConfig
    params: Params  # in the layout of `engine`
    engine: Engine
    name: str  # the directory or hub id that it came from
    fingerprint: str  # of the checkpoint's tensors, see `models.weights.load_params`
    tokenizer: PreTrainedTokenizerBase | None = None
    placement: Placement = ONE_DEVICE  # of the parameters, and of all that is made of them
    generation_defaults: GenerationDefaults | None = None  # from the checkpoint's files; None: those of `config`

    def __call__(self, input_ids: Any, attention_mask: Any | None = None) -> Output:
        """Logits [B, T, V] float32 and gate probabilities [L, B, T, E] float32 of whole texts.

        Args:
            input_ids: integers [B, T]; ids outside the vocabulary raise InputError.
            attention_mask: 1 for real tokens, 0 for padding, [B, T]; padding may stand on either side.
        """
        ids, mask = self.check_inputs(input_ids, attention_mask)
        return self.network.forward(self.params, ids, attention_mask=mask)

    @cached_property
    def network(self) -> Network:
        """The pure part: what runs on any parameters of this shape. Hashable, so it can be static under jit."""
        return Network(self.config, self.engine, self.placement)

    @property
    def generation(self) -> GenerationDefaults:
        """The ids that begin, end and pad a text, and the sampling that the checkpoint recommends."""
        return self.generation_defaults or GenerationDefaults.of(self.config)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Begin, end and padding ids of all files: never counted in statistics, so no key ends in one."""
        return tuple(sorted({*self.config.special_token_ids, *self.generation.token_ids}))

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters and the activations."""
        return self.params["decoder"]["embed"]["embedding"].dtype

    def empty_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A key/value cache for `capacity` positions, padding included. Raises InputError for fewer than one."""
        require_integer("batch_size", batch_size, least=1)
        require_integer("capacity", capacity, least=1)
        return KVCache.empty(self.config, batch_size, capacity, self.dtype, self.placement)

    def place(self, tree: T) -> T:
        """Arrays such as a table's or a state's, moved to where the model runs: to every device of its mesh.

        On one device they are where they should be. Large tables are divided, see `models.placement`.
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
    ) -> Generation:
        """Continue each text; returns int32 [B, T + new] ids, which begin with `input_ids`, and the carry as the state.

        A text ends with any of `generation.end_ids`.

        Args:
            input_ids: integers [B, T], padded on the left where the texts differ in length.
            max_new_tokens: the maximum; a text that has ended is filled up with the first of the padding id and the
                end ids that is in the vocabulary, or with 0.
            attention_mask: 1 for real tokens, 0 for padding, [B, T].
            sampling: how to choose; None: the most probable token, whatever the checkpoint recommends
                (`generation.sampling`).
            step: what runs one call of the decoder (`models.generation.Step`); None: the plain model.
            carry: what `step` threads through its calls, beside the key/value cache.

        Raises:
            InputError: fewer than one new token, or inputs that `check_inputs` refuses.
        """
        require_integer("max_new_tokens", max_new_tokens, least=1)
        ids, mask = self.check_inputs(input_ids, attention_mask, going_on=True)
        batch, length = ids.shape
        ends = self.generation.end_ids
        fills = (self.generation.pad_id, *ends)
        fill = next((token for token in fills if token is not None and token < self.config.vocab_size), 0)
        kv = self.empty_cache(batch, length + max_new_tokens)
        chosen = sampling or Sampling()
        run = step or self._step
        tokens, carry = generate(run, kv, carry, ids, mask, max_new_tokens, chosen, ends, fill)
        tokens[:, :length] = input_ids  # the caller's own, where padding has ids outside the vocabulary
        return Generation(tokens, carry)

    def _step(self, kv: KVCache, carry: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache, Any]:
        logits, kv = plain_step(self.params, kv, ids, mask, self.network)
        return logits, kv, carry

    def check_inputs(
        self, input_ids: Any, attention_mask: Any | None = None, *, going_on: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """int32 ids and bool mask, [B, T] each.

        A position that the mask calls padding may hold any id, for example that of a `[PAD]` which was added to the
        tokenizer and has no embedding; one outside the vocabulary becomes 0.

        Args:
            going_on: the texts are to be continued, so none may end in padding: the next token would follow that. A row
                that is padding from end to end fills a batch, and is not continued.

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
        raise InputError(f"{name} has rows of different lengths; pad them, on the left where texts go on") from None


@partial(jax.jit, static_argnames="network", donate_argnames="kv")
def plain_step(
    params: Params, kv: KVCache, ids: jax.Array, mask: jax.Array, network: Network
) -> tuple[jax.Array, KVCache | None]:
    out = network.forward(params, ids, attention_mask=mask, kv=kv, last_logits_only=True)
    return out.logits[:, -1], out.kv


def load_model(
    directory_or_hub_id: str | Path,
    dtype: str = "float32",
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a checkpoint of one of `models.families.FAMILIES` from a local directory or the Hugging Face hub.

    Args:
        directory_or_hub_id: a directory with config.json and safetensors, or a hub id; "reference" is the small model
            that comes with this package.
        dtype: "float32" or "bfloat16", of the parameters and the activations.
        implementation: expert engine, see `models.experts.get_engine`.
        mesh: the devices to divide it over, see `models.placement.make_mesh`; None: one device holds all of it.

    Raises:
        ConfigError, CheckpointError: the config or the weights cannot be run faithfully.
        MeshError: the model cannot be divided over the mesh.
        FileNotFoundError: neither a local directory nor a hub id that can be reached.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not supported; choose one of {sorted(DTYPES)}")
    engine = get_engine(implementation)
    directory = _resolve_directory(directory_or_hub_id)
    config = read_config(directory / "config.json")
    generation = read_generation(directory, config)
    placement = Placement.of(config, mesh)
    params, fingerprint = load_params(directory, config, DTYPES[dtype], placement)
    tokenizer = fitting_tokenizer(directory, config)
    prepared = prepare(params, engine, donate=True)
    return Model(config, prepared, engine, str(directory_or_hub_id), fingerprint, tokenizer, placement, generation)


REFERENCE = Path(__file__).parent / "reference"


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
