"""Any language model of transformers as a backbone.

Shape suffixes: B texts, T tokens of a text, D width, E width of the embedding, V vocabulary.
"""

import copy
import json
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.checkpoint import as_new_files_are
from zoo.base.hyperparameters import build, class_path
from zoo.base.named_weights import NamedSource
from zoo.lm.backbone import Backbone, BackboneKind
from zoo.lm.hf_decoder import HFModel
from zoo.lm.loading import build_network, kind_of, load_network, read_hf_config, set_dropout
from zoo.lm.pooling import PoolingKind
from zoo.lm.positions import check_padding, counts_own_positions, document_mask
from zoo.lm.sources import find_source
from zoo.lm.split import split_network
from zoo.lm.tuning import LoRA, Tuning, add_adapter, blocks_of, keep_first, train_last

__all__ = ["HFBackbone"]

BACKBONE_FILE = "backbone.json"
HEADS_FILE = "heads.safetensors"


class HFBackbone(Backbone):
    """A causal, encoder or encoder-decoder model of transformers, pretrained or with random weights.

    Frozen weights of a pretrained model are named in checkpoints (name and SHA-256) and not stored. Weights of the scalar head
    and of learned pooling are always trained.

    Args:
        source: Folder in the layout of Hugging Face (an adapter of peft too), GGUF file, ``organisation/name`` on the hub, or an
            asset such as ``minilm-l6`` or ``smollm2-135m``; or a configuration of transformers as plain data, with
            ``model_type``, for random weights.
        kind: What the model is built as; None: what its configuration says. ``encoder`` of an encoder-decoder model is its
            encoder alone, of a causal one the model without its output head.
        tuning: What is trained: everything, low-rank adapters, the last blocks, or nothing of the network.
        lora: Options of ``tuning="lora"``.
        last_n: Number of blocks that ``tuning="last_n"`` trains, with the norm after them.
        first_n: Number of blocks that are kept, from the first; None: all.
        dropout: Probability of all dropout of the network; None: as its configuration says.
        pooling: How the vectors of a text's tokens become one.
        scalar_head: Whether vectors are mapped to a number, without bias.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them.
        dtype: Type of the weights; None: torch's default.
        tokenizer: Where the tokenizer comes from, as ``source``; None: from ``source``.
        seed: Seed of random weights.

    Raises:
        FileNotFoundError: If nothing is found under ``source``.
        ModuleNotFoundError: If a package of the extra ``llm`` is needed and missing.
        ValueError: If arguments or weights do not fit one another.
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        kind: BackboneKind | None = None,
        tuning: Tuning = "full",
        lora: LoRA = LoRA(),  # noqa: B008 (read only)
        last_n: int = 1,
        pooling: PoolingKind = "mean",
        scalar_head: bool = False,
        activation_checkpointing: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        first_n: int | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        if tuning not in ("full", "lora", "last_n", "frozen"):
            raise ValueError(f"HFBackbone: tuning={tuning!r} must be one of full, lora, last_n, frozen.")
        self.source = find_source(source) if isinstance(source, str) else None
        self.is_pretrained = self.source is not None
        self.tuning = tuning
        self._tokenizer = tokenizer
        self._stores_all = False
        self._peft: Any = None
        config = read_hf_config(self.source or cast(dict[str, Any], source))
        if dropout is not None:
            set_dropout(config, dropout)
        self.kind = kind or kind_of(config)
        own_type = torch.get_default_dtype() if dtype is None else getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.source is not None:
                self.network = load_network(self.source, config, self.kind, own_type)
            else:
                self.network = build_network(config, self.kind, own_type)
            if first_n is not None:
                keep_first(self.network, first_n)
            embedding = self._hf.get_input_embeddings().weight
            self.vocab_size = embedding.shape[0]
            # OPT-350M maps its last vectors to the width of the embedding.
            own = self._hf.config
            self.hidden_size = getattr(own, "word_embed_proj_dim", own.hidden_size)
            self._tune(lora, last_n)
            self.add_heads(pooling, scalar_head)
        self._load_heads()
        if activation_checkpointing:
            self._hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._counts_positions = counts_own_positions(self.network)
        self.train()

    def _tune(self, lora: LoRA, last_n: int) -> None:
        adapter = None if self.source is None else self.source.adapter
        if getattr(self.network, "pooler", None) is not None:
            self._hf.pooler.requires_grad_(False)  # not part of the forward pass
        if self.tuning == "lora" or adapter is not None:
            if self.tuning not in ("lora", "frozen"):
                raise ValueError(f"HFBackbone: an adapter is trained with tuning='lora', not {self.tuning!r}; or merge it first.")
            # Not a child: it is another view of the same network, whose names of weights would be there twice.
            object.__setattr__(self, "_peft", add_adapter(self.network, lora, adapter, self.tuning == "lora"))
        elif self.tuning == "last_n":
            train_last(self.network, last_n)
        elif self.tuning == "frozen":
            self.network.requires_grad_(False)

    @property
    def _hf(self) -> Any:
        """The network without a static type: transformers adds most methods at run time."""
        return self.network

    @override
    def train(self, mode: bool = True) -> Self:
        """Set the mode; a network of which nothing is trained stays in evaluation, without dropout."""
        super().train(mode)
        if self.tuning == "frozen":
            self.network.eval()
        return self

    # Passes

    @override
    def forward(
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        decoder_ids_BT: Tensor | None = None,
        decoder_mask_BT: Tensor | None = None,
        embeddings_BTE: Tensor | None = None,
    ) -> Tensor:
        given = {"input_ids": ids_BT} if embeddings_BTE is None else {"inputs_embeds": embeddings_BTE}
        if self.kind == "encoder_decoder":
            memory_BTD = self._hf.get_encoder()(**given, attention_mask=mask_BT).last_hidden_state
            if decoder_ids_BT is None:
                return memory_BTD
            return self._hf.get_decoder()(
                input_ids=decoder_ids_BT,
                attention_mask=decoder_mask_BT,
                encoder_hidden_states=memory_BTD,
                encoder_attention_mask=mask_BT,
                use_cache=False,
            ).last_hidden_state
        inputs: dict[str, Any] = {**given, "attention_mask": mask_BT, "use_cache": False}
        if position_ids_BT is not None and mask_BT is not None and mask_BT.dim() == 4:
            inputs["position_ids"] = position_ids_BT
        elif position_ids_BT is not None:
            # The library divides rows by positions itself where it gets no mask; padding then is a document of its own.
            divides = self.kind == "causal" and self._hf.config.model_type != "opt"
            mask = None if divides else document_mask(position_ids_BT, mask_BT, self.kind)
            inputs.update(position_ids=position_ids_BT, attention_mask=mask)
        elif self._counts_positions:
            check_padding(mask_BT, type(self).__name__)
        if self.kind == "encoder":
            del inputs["use_cache"]
        return self._base(**inputs).last_hidden_state

    @property
    def _base(self) -> Any:
        """The network without its output head."""
        return self._hf.base_model

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        self.check_generates()
        config = self._hf.config
        if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * config.d_model**-0.5
        logits = self._hf.get_output_embeddings()(hidden)
        if (bias := getattr(self.network, "final_logits_bias", None)) is not None:  # BART
            logits = logits + bias
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    @override
    def input_embedding(self) -> nn.Embedding:
        return self._hf.get_input_embeddings()

    @property
    @override
    def start_id(self) -> int:
        for config in (self._hf.generation_config, self._hf.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if (token := getattr(config, name, None)) is not None:
                    return int(token)
        return super().start_id

    @property
    @override
    def pad_id(self) -> int:
        return self._hf.config.pad_token_id or 0

    @property
    @override
    def output_head(self) -> nn.Module | None:
        return None if self.kind == "encoder" else self._hf.get_output_embeddings()

    @property
    @override
    def has_adapter(self) -> bool:
        return self._peft is not None

    @override
    def without_adapter(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._peft is None else self._peft.disable_adapter()

    @override
    def head_weight(self) -> Tensor | None:
        head, config = self._hf.get_output_embeddings(), self._hf.config
        more = ("scale_decoder_outputs", "final_logit_softcapping")
        if type(head) is not nn.Linear or head.bias is not None or any(getattr(config, name, None) for name in more):
            return None
        return None if getattr(self.network, "final_logits_bias", None) is not None else head.weight

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.network)

    @override
    def decodes(self) -> HFModel:
        self.check_generates()
        return HFModel(self.network)

    @override
    def split(self, n: int) -> tuple[nn.Module, nn.Module]:
        return split_network(self._base, n)

    @cached_property
    @override
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        source = self.source if self._tokenizer is None else find_source(self._tokenizer)
        if source is None:
            return super().tokenizer
        folder = source.adapter if source.adapter is not None and (source.adapter / "tokenizer.json").is_file() else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder) if folder else AutoTokenizer.from_pretrained(**source.arguments)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source.name} has no tokenizer that can be read: give tokenizer, a folder with one.") from error
        self.check_tokenizer(tokenizer)
        return tokenizer

    # Checkpoints

    @property
    @override
    def init_config(self) -> dict[str, Any]:
        """Arguments as plain data; where all weights are trained, checkpoints hold them and do not need the source."""
        config = super().init_config
        if self.source is not None and self.tuning == "full":
            architecture = json.loads(self._hf.config.to_json_string(use_diff=False))
            config["init_args"].update(source=architecture, kind=self.kind, tokenizer=self._tokenizer or self.source.name)
        return config

    def named_source(self) -> NamedSource | None:
        """Source of frozen weights, see `zoo.base.named_weights`; None where everything is trained or stored."""
        return None if self.source is None or self.tuning == "full" or self._stores_all else self.source.named

    def named_weights(self) -> list[str]:
        """Names of the frozen weights that the source gives."""
        return [
            f"network.{name}"
            for name, parameter in self.network.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and "lora_" not in name and not name.startswith("pooler.")
        ]

    def store_all(self) -> None:
        """Store all weights in checkpoints from here on, since some are not the source's any more."""
        self._stores_all = True

    # Sharing

    def save_pretrained(self, folder: str | Path, merged: bool = False) -> Path:
        """Write the model, or its adapter, with the tokenizer, in Hugging Face's layout, which ``AutoModel`` and peft read.

        Args:
            folder: Made if missing.
            merged: Write a whole model into which the adapter is added, instead of the adapter.

        Returns:
            The folder.

        Raises:
            ValueError: If an adapter is to be written whose base has no name, since its weights are random.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._peft is None:
            self._hf.save_pretrained(folder)
        elif merged:
            self.merged_network().save_pretrained(folder)
        elif self.source is None:
            raise ValueError("HFBackbone: the adapter's base has random weights, which no file holds: save it merged.")
        else:
            self._peft.peft_config["default"].base_model_name_or_path = self.source.name
            self._peft.save_pretrained(folder, save_embedding_layers=False)
        if self._tokenizer is not None or (self.source is not None and self.source.has_tokenizer):
            self.tokenizer.save_pretrained(folder)
        arguments = {**super().init_config["init_args"], "tokenizer": None, "kind": self.kind}
        if merged:
            arguments.update(tuning="full")
        (folder / BACKBONE_FILE).write_text(json.dumps({k: v for k, v in arguments.items() if k != "source"}, indent=2) + "\n")
        if heads := self._heads():
            save_file(heads, folder / HEADS_FILE)
            as_new_files_are(folder / HEADS_FILE)
        return folder

    def merged_network(self) -> Any:
        """A copy of the network with the adapters added to its weights."""
        return self._hf if self._peft is None else copy.deepcopy(self._peft).merge_and_unload()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> Self:
        """Build the backbone that `save_pretrained` wrote, or of any folder in Hugging Face's layout.

        Args:
            folder: The folder.
            overrides: Arguments of the constructor to replace.
        """
        file = Path(folder) / BACKBONE_FILE
        arguments = json.loads(file.read_text()) if file.is_file() else {}
        return build(cls, {"class_path": class_path(cls), "init_args": {**arguments, "source": str(folder), **overrides}})

    def _heads(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("network.")}

    def _load_heads(self) -> None:
        if self.source is None:
            return
        file = (self.source.adapter or self.source.folder) / HEADS_FILE
        own = self._heads()
        if own and file.is_file():
            self.load_state_dict({name: value for name, value in load_file(file).items() if name in own}, strict=False)
