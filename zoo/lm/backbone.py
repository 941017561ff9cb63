"""Language models as one component of a module: the interface that Hugging Face's and Ling's share.

Shape suffixes: B texts, T tokens of a text, D width, E width of the embedding, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from zoo.base.hyperparameters import Configurable
from zoo.lm.decoder import Decodes
from zoo.lm.pooling import Pooling, PoolingKind

__all__ = ["Backbone", "BackboneKind"]

BackboneKind = Literal["causal", "encoder", "encoder_decoder"]


class Backbone(Configurable, nn.Module):
    """A language model: ids to vectors of tokens, of texts, to the scores of next tokens, or to one number.

    A subclass sets the attributes, calls `add_heads`, and overrides ``forward`` and ``logits``.

    Attributes:
        network: The model itself.
        kind: ``causal``, ``encoder`` or ``encoder_decoder``.
        hidden_size: D.
        vocab_size: V, rows of the embedding.
        is_pretrained: Whether weights come from somewhere; else they are random.
    """

    network: nn.Module
    kind: BackboneKind
    hidden_size: int
    vocab_size: int
    is_pretrained: bool = False
    #: Map of vectors to a number, without bias; None: there is none.
    scalar: nn.Linear | None

    def add_heads(self, pooling: PoolingKind, scalar_head: bool) -> None:
        """Add the parts that stand behind the network; they are trained whatever part of the network is.

        Args:
            pooling: Of the vectors of a text's tokens.
            scalar_head: Whether vectors are mapped to a number.
        """
        self.pooling = Pooling(pooling, self.hidden_size)
        self.scalar = nn.Linear(self.hidden_size, 1, bias=False) if scalar_head else None
        if self.scalar is not None:
            nn.init.normal_(self.scalar.weight, std=self.hidden_size**-0.5)

    def forward(
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        decoder_ids_BT: Tensor | None = None,
        decoder_mask_BT: Tensor | None = None,
        embeddings_BTE: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids to (B, T, D), the input of the output head.

        Args:
            ids_BT: Ids of tokens; None where their embeddings are given.
            mask_BT: 1 for tokens, 0 for padding; None: no padding. Or, for a causal model and with position_ids_BT, bool
                (B, 1, T, T), true where a query (rows) sees a key.
            position_ids_BT: Positions that start at 0 with each document, whose tokens do not see those of others; None: each
                text is one document.
            decoder_ids_BT: Ids that the decoder of an encoder-decoder model reads; None: its encoder's vectors are returned.
            decoder_mask_BT: 1 for tokens of the decoder, 0 for padding.
            embeddings_BTE: Vectors in the place of ``input_embedding(ids_BT)``.

        Raises:
            ValueError: If the model has positions of its own and padding on the left would shift them.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) to (..., V).

        Raises:
            ValueError: If the model is an encoder, or has no output head.
        """
        raise NotImplementedError

    @property
    def input_embedding(self) -> nn.Embedding:
        """Table of the vectors of ids, (V, E); E is D but for models that map them."""
        raise NotImplementedError

    @property
    def start_id(self) -> int:
        """Token with which the answers of an encoder-decoder model begin."""
        raise ValueError(f"{type(self).__name__} has no decoder beside an encoder.")

    @property
    def pad_id(self) -> int:
        """Token that fills up rows; masks hide it."""
        return 0

    @property
    def output_head(self) -> nn.Module | None:
        """Module that maps vectors to scores of tokens; None if there is none."""
        return None

    def freeze_output_head(self) -> None:
        """Leave the output head out of training, for a model whose only output is its scalar."""
        if self.output_head is not None:
            embedded = {id(each.weight) for each in self.modules() if isinstance(each, nn.Embedding)}
            for parameter in self.output_head.parameters():
                if id(parameter) not in embedded:
                    parameter.requires_grad_(False)

    @property
    def has_adapter(self) -> bool:
        """Whether low-rank adapters are trained on frozen weights, which are a reference model then."""
        return False

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Context in which the adapters do nothing."""
        return nullcontext()

    def head_weight(self) -> Tensor | None:
        """Factor (V, D) of vectors if that is all that `logits` does; None if it does more."""
        return None

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks in the order of the forward pass, for compilation and for strategies that work block by block."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the weights.

        Raises:
            ValueError: If there is none, or it has ids beyond the vocabulary.
        """
        raise ValueError(f"{type(self).__name__} has no tokenizer of its own: give one to the data.")

    def pooled(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """One vector a text, (B, T) to (B, D)."""
        return self.pooling(self(ids_BT, mask_BT), mask_BT)

    def scores(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """One number a text, (B, T) to (B,).

        Raises:
            ValueError: If there is no scalar head.
        """
        return self._scalar()(self.pooled(ids_BT, mask_BT)).squeeze(-1)

    def values(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """One number a token, (B, T) to (B, T).

        Raises:
            ValueError: If there is no scalar head.
        """
        return self._scalar()(self(ids_BT, mask_BT)).squeeze(-1)

    def _scalar(self) -> nn.Linear:
        if self.scalar is None:
            raise ValueError(f"{type(self).__name__} has no scalar head: build it with scalar_head=True.")
        return self.scalar

    def split(self, n: int) -> tuple[nn.Module, nn.Module]:
        """Cut the network after n blocks: ``high(low(ids, mask), mask)`` equals ``self(ids, mask)``.

        Args:
            n: Number of blocks in the low half, 0 to all.

        Returns:
            ``low(ids, mask)`` and ``high(vectors, mask)``, which share the parameters of this backbone.

        Raises:
            ValueError: If this model cannot be cut, or has fewer blocks.
        """
        raise ValueError(f"{type(self).__name__} cannot be split: take an HFBackbone, BERT-, LLaMA-, GPT-2- or OPT-like.")

    def decodes(self) -> Decodes:
        """The model as `zoo.lm.generation.generate` continues prompts with it.

        Raises:
            ValueError: If the model is an encoder.
        """
        raise NotImplementedError

    def check_generates(self) -> None:
        """Refuse to generate text with a model that predicts no next token.

        Raises:
            ValueError: If the model is an encoder.
        """
        if self.kind == "encoder":
            raise ValueError(
                f"{type(self).__name__}: an encoder generates no text: take a causal or an encoder-decoder model (kind)."
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compare the sizes of the vocabularies.

        Args:
            tokenizer: One of the data, with ``vocab_size``, or of transformers.

        Raises:
            ValueError: If the tokenizer has ids beyond the model's vocabulary.
        """
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.vocab_size
        if size > self.vocab_size:
            raise ValueError(
                f"The tokenizer has {size} ids, the model a vocabulary of {self.vocab_size}: take the model's own tokenizer, or"
                " a model with a larger vocabulary."
            )
