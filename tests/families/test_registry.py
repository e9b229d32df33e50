"""What a layout says is true of the real modules; a skeleton is the model without its weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
)

from lmpress.errors import RequestError
from lmpress.families import layout_of, skeleton, supported
from tests.tiny import TINY, tiny_model

every_model = pytest.mark.parametrize("name", TINY)


def _tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(7))


@every_model
def test_layout_names_the_modules_of_the_model(name):
    model = tiny_model(name)
    layout = layout_of(model.config)
    assert len(model.get_submodule(layout.blocks)) == layout.num_blocks
    assert model.get_submodule(layout.embedding) is model.get_input_embeddings()
    assert model.get_submodule(layout.head) is model.get_output_embeddings()
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert layout.tied == shared
    for index in range(layout.num_blocks):
        block = model.get_submodule(layout.block_name(index))
        linears = {key for key, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == set(layout.linears)  # none is missing, none is invented
    assert set(layout.attention) | set(layout.mlp) == set(layout.linears)
    assert not set(layout.attention) & set(layout.mlp)
    assert [site.name for site in layout.sites] == ["qkv", "o", "gate_up", "down"]


@every_model
def test_linears_of_a_site_share_their_input_and_sites_run_in_order(name):
    model = tiny_model(name)
    layout = layout_of(model.config)
    block = model.get_submodule(layout.block_name(1))
    calls = []
    for linear in layout.linears:
        block.get_submodule(linear).register_forward_pre_hook(
            lambda _, inputs, linear=linear: calls.append((linear, inputs[0]))
        )
    with torch.no_grad():
        model(_tokens())
    order = [layout.sites.index(layout.site_of(linear)) for linear, _ in calls]
    assert sorted(linear for linear, _ in calls) == sorted(layout.linears)
    assert order == sorted(order)
    inputs = dict(calls)
    for site in layout.sites:
        assert len({id(inputs[linear]) for linear in site.linears}) == 1
    firsts = [inputs[site.linears[0]] for site in layout.sites]
    for i, first in enumerate(firsts):
        for second in firsts[i + 1 :]:  # a site is no part of another
            assert first.numel() != second.numel() or not torch.equal(first.flatten(), second.flatten())


@every_model
@torch.no_grad()
def test_a_neuron_is_a_row_of_the_inputs_and_a_column_of_the_output(name):
    model = tiny_model(name)
    layout, ids, j = layout_of(model.config), _tokens(), 5
    block = model.get_submodule(layout.block_name(0))
    inputs = [block.get_submodule(linear) for linear in layout.neurons.inputs]
    output = block.get_submodule(layout.neurons.output)
    signal = block.get_submodule(layout.neurons.signal)
    original = model(ids).logits

    output.weight[:, j] = 0
    removed = model(ids).logits
    assert not torch.allclose(removed, original, atol=1e-4)
    for linear in inputs:  # with its column gone, a neuron's rows and biases reach nothing
        linear.weight[j] += 1
        if linear.bias is not None:
            linear.bias[j] += 1
    assert torch.equal(model(ids).logits, removed)

    restored = tiny_model(name)  # and an idle signal is as good as no column
    model.load_state_dict(restored.state_dict())
    signal.weight[j] = 0
    if signal.bias is not None:
        signal.bias[j] = 0
    torch.testing.assert_close(model(ids).logits, removed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("opt")])
def test_grouped_queries_have_narrow_keys_and_values(name):
    model = tiny_model(name)
    block = model.get_submodule(layout_of(model.config).block_name(0))
    head = getattr(model.config, "head_dim", None) or 16
    q, k, v, o = (block.get_submodule(linear) for linear in layout_of(model.config).attention)
    assert q.weight.shape == (4 * head, 64)
    assert k.weight.shape == v.weight.shape == (2 * head, 64)
    assert o.weight.shape == (64, 4 * head)


@every_model
def test_a_skeleton_with_weights_is_the_model(name):
    config = TINY[name]()
    before = copy.deepcopy(config.to_dict())
    hollow = skeleton(config)
    assert config.to_dict() == before
    assert not hollow.training
    assert all(p.is_meta and p.dtype == torch.float32 for p in hollow.parameters())
    head, embedding = hollow.get_output_embeddings(), hollow.get_input_embeddings()
    assert (head.weight is embedding.weight) == layout_of(config).tied

    model = tiny_model(name)
    buffers = dict(hollow.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        assert torch.equal(buffers[key], buffer)
    hollow.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(hollow(_tokens()).logits, model(_tokens()).logits)


def test_a_skeleton_says_the_dtype_it_was_asked_for():
    hollow = skeleton(TINY["gemma3"](), torch.bfloat16)
    assert {p.dtype for p in hollow.parameters()} == {torch.bfloat16}
    assert hollow.model.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_a_skeleton_takes_no_memory_for_weights():
    """A model of more than 10^14 bytes: no machine could hold it, even for a moment."""
    config = LlamaConfig(
        hidden_size=1 << 20, intermediate_size=1 << 22, num_hidden_layers=8, num_attention_heads=64
    )
    assert sum(p.numel() for p in skeleton(config).parameters()) > 10**14


def test_supported_types_are_known_to_transformers():
    for model_type in supported():
        assert AutoConfig.for_model(model_type).model_type == model_type
    assert {TINY[name]().model_type for name in TINY} == set(supported())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Phi3Config(pad_token_id=0), "'phi3' is not supported"),
        (MixtralConfig(), "a mixture of experts"),
        (Gemma3Config(), "its text model alone, type 'gemma3_text'"),
        (object(), "None is not supported"),
    ],
)
def test_an_unsupported_family_is_refused(config, words):
    with pytest.raises(RequestError, match=words) as refusal:
        layout_of(config)
    assert all(model_type in str(refusal.value) for model_type in supported())
    assert "\n" not in str(refusal.value)


def test_from_config_of_a_skeleton_leaves_transformers_as_it_was():
    skeleton(TINY["llama"]())
    model = AutoModelForCausalLM.from_config(TINY["llama"]())
    assert not any(p.is_meta for p in model.parameters())
