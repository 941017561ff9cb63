"""Generation by models of transformers: the library's greedy tokens, rows as alone, log-probabilities of a full pass, ends."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from zoo.base.random import SampleRandom
from zoo.lm.generation import Generation, continue_prompts, generate
from zoo.lm.hf_decoder import HFModel
from zoo.lm.stop_strings import StopStrings, text_before

VOCABULARY = 61
_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 60}
_WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 40, **_IDS}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_WIDTHS, intermediate_size=24, num_key_value_heads=2)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_WIDTHS, intermediate_size=24, num_key_value_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=40, **_IDS)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_WIDTHS, ffn_dim=24, word_embed_proj_dim=16)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                              eos_token_id=None, pad_token_id=60, decoder_start_token_id=0)
    ),
}  # fmt: skip


@functools.cache
def library_model(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((12 if family == "opt" else 3) if parameter.dim() > 1 else 1)  # scores that are not all alike
    return model


def prompts_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 59, (length,), generator=generator) for length in lengths]


def padded(prompts: list[Tensor], left: bool = True) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), 60), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_library(family: str, cache: Any) -> None:
    model = library_model(family)
    ids, mask = padded(prompts_of(7, 4))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, -8:]
    found = generate(HFModel(model, cache), ids, mask, max_new_tokens=8)
    assert torch.equal(found[:, :7], ids) and torch.equal(found[:, 7:], expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_rows_are_the_prompts_alone(family: str) -> None:
    model, prompts, index = HFModel(library_model(family)), prompts_of(3, 6, 1), torch.tensor([4, 0, 17])
    options = Generation(max_new_tokens=6, temperature=1.2, top_k=30, repetition_penalty=1.1)
    alone = [
        generate(model, prompt[None], None, options, random=SampleRandom(1, index[row : row + 1]))[0, len(prompt) :]
        for row, prompt in enumerate(prompts)
    ]
    for left in (True, False) if model.encodes_prompts else (True,):
        ids, mask = padded(prompts, left)
        assert torch.equal(generate(model, ids, mask, options, random=SampleRandom(1, index))[:, 6:], torch.stack(alone))
        order = torch.tensor([2, 0])
        some = generate(model, ids[order], mask[order], options, random=SampleRandom(1, index[order]))[:, 6:]
        assert torch.equal(some, torch.stack(alone)[order])
    other = generate(model, ids, mask, options, random=SampleRandom(2, index))[:, 6:]
    assert not torch.equal(other, torch.stack(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_full_pass(family: str) -> None:
    model, (prompt,) = library_model(family), prompts_of(5)
    new = continue_prompts(HFModel(model), prompt[None], temperature=0.7, top_k=20, max_new_tokens=6, logp=True)
    with torch.no_grad():
        if family == "t5":
            start = torch.cat([torch.zeros(1, 1, dtype=torch.int64), new.tokens[:, :-1]], dim=1)
            logits = model(input_ids=prompt[None], decoder_input_ids=start).logits
        else:
            logits = model(torch.cat([prompt[None], new.tokens], dim=1)).logits[:, 4:-1]
    expected = logits.log_softmax(-1).gather(2, new.tokens[..., None]).squeeze(2)
    assert new.logp is not None and new.length.tolist() == [6]
    assert torch.allclose(new.logp, expected, rtol=0, atol=1e-6)


def test_rows_end_at_stop_tokens_and_stop_texts() -> None:
    model = HFModel(library_model("llama"))
    ids, mask = padded(prompts_of(5, 3))
    free = generate(model, ids, mask, max_new_tokens=9, temperature=2.0)[:, 5:]
    stop = int(free[0, 3])
    assert stop not in free[0, :3].tolist()
    first = (free == stop).int().argmax(1).where((free == stop).any(1), 8) + 1

    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    for ends in ({"eos_token_id": stop}, {"stop": [f"<{int(free[0, 2])}><{stop}>"], "decode": decode}):
        new = continue_prompts(model, ids, mask, max_new_tokens=9, temperature=2.0, logp=True, **ends)
        assert new.logp is not None and new.length[0] == 4
        assert torch.equal(new.tokens[0, :4], free[0, :4]) and bool((new.tokens[0, 4:] == 60).all())
        assert bool((new.logp[0, :4] < 0).all()) and bool((new.logp[0, 4:] == 0).all())
        assert new.length[1] == (first[1] if "eos_token_id" in ends else 9)


def test_stop_texts_that_span_tokens_are_found() -> None:
    stops = StopStrings(["b c"], lambda ids: bytes(ids).decode(errors="replace"), 1)
    found = [bool(stops.ended(torch.tensor([byte]))) for byte in b"abb cd"]
    assert found == [False, False, False, False, True, True]
    assert text_before("abb cd", ["b c"]) == "ab" and text_before("ab", ["x"]) == "ab"


def test_wrapped_models_are_found_and_keep_their_mode() -> None:
    model = torch.nn.Module()
    model.module = library_model("gpt2")
    model.forward = lambda **inputs: model.module(**inputs)  # type: ignore[method-assign]  # as DDP has it
    ids = torch.stack(prompts_of(4))
    model.train()
    tokens = generate(HFModel(model), ids, max_new_tokens=4)
    assert model.module.training and torch.equal(tokens, generate(HFModel(model.module), ids, max_new_tokens=4))
    model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.tensor([[1, 61]])}, "holds the id 61, but the model's vocabulary has the ids 0 to 60"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padding after a token"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "Prompt 0 of the batch is empty"),
        ({"max_new_tokens": 39}, "need 41 positions, but the model has 40"),
        ({"compile": True}, "no compiled step"),
        ({"stop": ["x"]}, "stop texts need decode"),
        ({"stop": "x"}, "must be a list of texts"),
        ({"eos_token_id": 61}, "eos_token_id=61 is outside"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"input_ids": torch.ones(2, 3, dtype=torch.long), "max_new_tokens": 2, **change}
    with pytest.raises(ValueError, match=message) as caught:
        generate(HFModel(library_model("gpt2")), **arguments)
    assert len(str(caught.value)) <= 300


def test_models_that_cannot_generate_are_refused() -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="BertModel cannot generate: it is an encoder"):
        HFModel(transformers.BertModel(config))
    with pytest.raises(ValueError, match="T5EncoderModel cannot generate"):
        HFModel(transformers.T5EncoderModel(library_model("t5").config))


def test_padding_is_refused_where_positions_cannot_be_given() -> None:
    model = HFModel(library_model("gpt2"))
    model.arguments -= {"position_ids"}
    ids, mask = padded(prompts_of(4, 2))
    with pytest.raises(ValueError, match="takes no position_ids, so that padding on the left would shift them"):
        generate(model, ids, mask, max_new_tokens=2)
