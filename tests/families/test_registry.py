"""What a layout says is true of the real modules; a skeleton is the model without its weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)

from lmpress.errors import RequestError
from lmpress.families import Feed, Rows, layout_of, skeleton, supported
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
        module, block = model.get_submodule(layout.block_name(index)), layout.block(index)
        linears = {key for key, child in module.named_modules() if isinstance(child, nn.Linear)}
        assert linears == set(block.linears)  # none is missing, none is invented
        assert set(block.attention) | set(block.mlp) == set(block.linears)
        assert not set(block.attention) & set(block.mlp)
        assert [site.name for site in block.sites] == ["qkv", "o", "gate_up", "down"]


@every_model
def test_linears_of_a_site_share_their_input_and_sites_run_in_order(name):
    model = tiny_model(name)
    whole = layout_of(model.config)
    layout = whole.block(1)
    block = model.get_submodule(whole.block_name(1))
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
    whole, ids, j = layout_of(model.config), _tokens(), 5
    block, neurons = model.get_submodule(whole.block_name(0)), whole.block(0).neurons
    output = block.get_submodule(neurons.output)
    original = model(ids).logits

    output.weight[:, j] = 0
    removed = model(ids).logits
    assert not torch.allclose(removed, original, atol=1e-4)
    for rows in neurons.inputs:  # with its column gone, a neuron's rows and biases reach nothing
        linear, row = _row(block, rows, j)
        linear.weight[row] += 1
        if linear.bias is not None:
            linear.bias[row] += 1
    assert torch.equal(model(ids).logits, removed)

    restored = tiny_model(name)  # and an idle signal is as good as no column
    model.load_state_dict(restored.state_dict())
    signal, row = _row(block, neurons.signal, j)
    signal.weight[row] = 0
    if signal.bias is not None:
        signal.bias[row] = 0
    torch.testing.assert_close(model(ids).logits, removed, atol=1e-5, rtol=1e-5)


def _row(block: nn.Module, rows: Rows, neuron: int) -> tuple[Any, int]:
    linear: Any = block.get_submodule(rows.linear)
    return linear, rows.within(linear.out_features).start + neuron


@every_model
@torch.no_grad()
def test_the_rows_of_the_neurons_are_all_rows_each_once(name):
    model = tiny_model(name)
    layout = layout_of(model.config)
    for index in range(layout.num_blocks):
        block, neurons = model.get_submodule(layout.block_name(index)), layout.block(index).neurons
        width = block.get_submodule(neurons.output).in_features
        assert neurons.signal in neurons.inputs
        for linear in neurons.linears:
            count = block.get_submodule(linear).out_features
            parts = [rows.within(count) for rows in neurons.inputs if rows.linear == linear]
            assert all(part.stop - part.start == width for part in parts)
            assert sorted(i for part in parts for i in range(count)[part]) == list(range(count))


def _scaled_feed(block: nn.Module, feed: Feed, width: int) -> torch.Tensor:
    """Scale what feeds a site; by what its channels (width,) are scaled then."""
    groups, repeats = feed.heads
    generator = torch.Generator().manual_seed(11)
    scale = torch.rand(groups, 1, width // (groups * repeats), generator=generator) + 0.5
    if feed.norm is not None:
        norm: Any = block.get_submodule(feed.norm.name)
        norm.weight.copy_((norm.weight + feed.norm.offset) * scale.flatten() - feed.norm.offset)
        if feed.norm.centred:
            norm.bias.mul_(scale.flatten())
        return scale.flatten()
    assert feed.rows is not None
    linear: Any = block.get_submodule(feed.rows.linear)
    rows = feed.rows.within(linear.out_features)
    linear.weight[rows] *= scale.flatten()[:, None]
    if linear.bias is not None:
        linear.bias[rows] *= scale.flatten()
    return scale.expand(groups, repeats, -1).flatten()


@every_model
@pytest.mark.parametrize("site", ["qkv", "o", "gate_up", "down"])
@torch.no_grad()
def test_scaling_what_feeds_a_site_scales_its_channels(name, site):
    """Their inverse in the columns of the readers gives the same outputs, in every block."""
    ids, fed = _tokens(), 0
    expected = tiny_model(name)(ids).logits
    for index in range(layout_of(TINY[name]()).num_blocks):
        model = tiny_model(name)
        layout = layout_of(model.config)
        block = model.get_submodule(layout.block_name(index))
        (at,) = (each for each in layout.block(index).sites if each.name == site)
        if at.feed is None:
            continue
        fed += 1
        readers: list[Any] = [block.get_submodule(linear) for linear in at.linears]
        scale = _scaled_feed(block, at.feed, readers[0].in_features)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
        for reader in readers:
            reader.weight.div_(scale)
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=2e-4)
    alone = name == "opt-post-norm" and site in ("qkv", "gate_up")  # its norms feed the residual stream, too
    assert fed == (0 if alone else layout.num_blocks)


def test_neurons_behind_a_nonlinearity_that_is_not_homogeneous_have_no_feed():
    layout = layout_of(OPTConfig(num_hidden_layers=1, activation_function="gelu"))
    assert layout.block(0).site_of("fc2").feed is None


@every_model
@torch.no_grad()
def test_the_last_norm_feeds_the_head_alone(name):
    model, ids = tiny_model(name), _tokens()
    layout = layout_of(model.config)
    if layout.last_norm is None:
        assert name.startswith("opt")
        return
    head = model.get_submodule(layout.head)
    head.weight = nn.Parameter(head.weight.clone())  # tied or not
    expected = model(ids).logits
    head.weight.div_(_scaled_feed(model, Feed(norm=layout.last_norm), head.in_features))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@every_model
@torch.no_grad()
def test_writers_and_nothing_else_reach_the_residual_stream(name):
    model, ids = tiny_model(name), _tokens()
    layout = layout_of(model.config)
    module, block = model.get_submodule(layout.block_name(1)), layout.block(1)
    if name == "opt-post-norm":  # norms behind the sums are no part of what is added
        module.self_attn_layer_norm = module.final_layer_norm = nn.Identity()
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    module.register_forward_pre_hook(lambda _, args: seen.update(entrance=args[0].clone()))
    module.register_forward_hook(keep("exit"))
    for linear in block.writers:
        module.get_submodule(linear).register_forward_hook(keep(linear))
    model(ids)
    width = seen["entrance"].shape[-1]
    added = [seen[linear].reshape(-1, width) for linear in block.writers]
    if block.norms_behind:
        norms = [module.get_submodule(norm.name) for norm in block.norms_behind]
        added = [norm(each) for norm, each in zip(norms, added, strict=True)]
    expected = seen["entrance"].reshape(-1, width) + sum(added)
    torch.testing.assert_close(seen["exit"].reshape(-1, width), expected, atol=1e-5, rtol=1e-5)

    for linear in block.writers:
        writer: Any = module.get_submodule(linear)
        writer.weight.zero_()
        if writer.bias is not None:
            writer.bias.zero_()
    silent = model(ids).logits
    for linear in set(block.linears) - set(block.writers):
        module.get_submodule(linear).weight.add_(1.0)
    assert torch.equal(model(ids).logits, silent)


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith(("opt", "phi3"))])
def test_grouped_queries_have_narrow_keys_and_values(name):
    model = tiny_model(name)
    layout = layout_of(model.config)
    block = model.get_submodule(layout.block_name(0))
    head = getattr(model.config, "head_dim", None) or 16
    q, k, v, o = (block.get_submodule(linear) for linear in layout.block(0).attention)
    assert q.weight.shape == (4 * head, 64)
    assert k.weight.shape == v.weight.shape == (2 * head, 64)
    assert o.weight.shape == (64, 4 * head)


def test_fused_queries_keys_and_values_feed_by_their_last_rows():
    model = tiny_model("phi3")
    layout = layout_of(model.config)
    fused = model.get_submodule(layout.block_name(0)).get_submodule(layout.block(0).attention[0])
    assert fused.weight.shape == ((4 + 2 + 2) * 16, 64)
    feed = layout.block(0).sites[1].feed
    assert feed is not None
    assert feed.rows is not None
    assert feed.heads == (2, 2)
    assert feed.rows.within(fused.out_features) == slice((4 + 2) * 16, (4 + 2 + 2) * 16)


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
        (FalconConfig(), "'falcon' is not supported"),
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
