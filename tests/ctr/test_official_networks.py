"""Networks with the weights of published code: they score as that code does, and nothing else is let in."""

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.ctr import DLRM, DLRMNetwork, MeLUNetwork
from zoo.gmeta import GMeta

DIMS, NUMBERS, SIZE = [5, 7, 4], 3, 4


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers)


class Reference(nn.Module):
    """The computation of ``dlrm_s_pytorch.py``, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(dim, SIZE, mode="sum") for dim in DIMS)
        self.bot_l, self.top_l = mlp(NUMBERS, 6, SIZE), mlp(SIZE + 6, 8, 5, 1)[:-1]

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        x = self.bot_l(dense)
        vectors = torch.stack([x, *(table(sparse[:, f, None]) for f, table in enumerate(self.emb_l))], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        pairs = [products[:, i, j] for i in range(vectors.shape[1]) for j in range(i)]
        scores: Tensor = self.top_l(torch.cat([x, torch.stack(pairs, dim=1)], dim=1)).squeeze(1)
        return scores


def as_torchrec(reference: Reference) -> dict[str, Tensor]:
    """The same network as TorchRec names it, whose pairs are those of the upper triangle."""
    found = {}
    for name, value in reference.state_dict().items():
        part, number, kind = name.split(".")
        if part == "emb_l":
            found[f"sparse_arch.embedding_bag_collection.embedding_bags.t_f{number}.weight"] = value
        elif part == "bot_l":
            found[f"dense_arch.model._mlp.{int(number) // 2}._linear.{kind}"] = value
        else:
            last = int(number) == 4
            found[f"over_arch.model.{'1' if last else f'0._mlp.{int(number) // 2}._linear'}.{kind}"] = value
    lower = [(i, j) for i in range(4) for j in range(i)]
    upper = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    columns = [*range(SIZE), *(SIZE + lower.index((j, i)) for i, j in upper)]
    name = "over_arch.model.0._mlp.0._linear.weight"
    found[name] = found[name][:, columns]
    return found


def rows(count: int = 9) -> tuple[Tensor, Tensor]:
    return torch.stack([torch.randint(dim, (count,)) for dim in DIMS], dim=1), torch.randn(count, NUMBERS)


@pytest.mark.parametrize("kind", ["reference", "torchrec"])
def test_dlrm_scores_as_the_published_code(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = Reference()
    file = tmp_path / "model.pt"
    weights = {"state_dict": reference.state_dict(), "epoch": 1} if kind == "reference" else as_torchrec(reference)
    torch.save(weights, file)
    module = DLRM.from_official(file)
    sparse, dense = rows()
    with torch.no_grad():
        torch.testing.assert_close(module.network(sparse, dense), reference(sparse, dense), rtol=0, atol=1e-6)
    network = partial(DLRMNetwork, embed_dim=SIZE, bottom=(6,), top=(8, 5), dropout=0.0)
    meta = GMeta(network, DIMS, NUMBERS)
    meta.load_official(file)
    assert all(torch.equal(a, b) for a, b in zip(meta.network.parameters(), module.network.parameters(), strict=True))


class PublishedMeLU(nn.Module):
    """The computation of MeLU's published code, with its names."""

    def __init__(self) -> None:
        super().__init__()
        size = 3
        item, user = nn.Module(), nn.Module()
        item.embedding_rate = nn.Embedding(2, size)
        for name, count in (("genre", 4), ("director", 5), ("actor", 6)):
            setattr(item, f"embedding_{name}", nn.Linear(count, size, bias=False))
        for name, count in (("gender", 2), ("age", 3), ("occupation", 4), ("area", 5)):
            setattr(user, f"embedding_{name}", nn.Embedding(count, size))
        layers = {"fc1": nn.Linear(8 * size, 7), "fc2": nn.Linear(7, 6), "linear_out": nn.Linear(6, 1)}
        self.model = nn.ModuleDict(OrderedDict(item_emb=item, user_emb=user, **layers))

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        item, user = self.model["item_emb"], self.model["user_emb"]
        sets = zip(("genre", "director", "actor"), dense.split([4, 5, 6], dim=1), strict=True)
        parts = [item.embedding_rate(sparse[:, 0])]
        parts += [getattr(item, f"embedding_{name}")(one) / one.sum(1, keepdim=True) for name, one in sets]
        names = ("gender", "age", "occupation", "area")
        parts += [getattr(user, f"embedding_{name}")(sparse[:, 1 + f]) for f, name in enumerate(names)]
        hidden = self.model["fc2"](self.model["fc1"](torch.cat(parts, dim=1)).relu()).relu()
        scores: Tensor = self.model["linear_out"](hidden).squeeze(1)
        return scores


def test_melu_scores_as_the_published_code() -> None:
    torch.manual_seed(0)
    published, ours = PublishedMeLU(), MeLUNetwork([2, 2, 3, 4, 5], 15, 3, [4, 5, 6], [7, 6])
    ours.load_state_dict(ours.from_official(published.state_dict()))
    sparse = torch.stack([torch.randint(dim, (9,)) for dim in ours.field_dims], dim=1)
    dense = (torch.rand(9, 15) < 0.5).float()
    dense[:, [0, 4, 9]] = 1.0
    torch.testing.assert_close(ours(sparse, dense), published(sparse, dense), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no weights of MeLU"):
        ours.from_official({"model.fc1.weight": torch.zeros(1)})


def test_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"emb_l.0.weight": torch.zeros(5, 4), "stem.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"no weights of DLRM.*stem\.weight"):
        DLRM([5, 7], 3).load_official(file)
    torch.save(Reference().state_dict(), file)
    with pytest.raises(ValueError, match=r"embedding\.table\.weight"):
        DLRM([5, 7], 3, embed_dim=SIZE, bottom=[6], top=[8, 5]).load_official(file)
