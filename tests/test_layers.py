"""Which weights of a model are read, by which names, and what happens to a mask when the model changes under it."""
import copy
import gc
import json
import os
import pickle
import warnings
import weakref
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks
from opentrans.core import bare_parameters, find_layers, layers, LayerSelection, unread
from opentrans.towers import head_of, HEADS, trunk
from opentrans.errors import OpenTransError
from opentrans.runtime import after_step
from opentrans.pruning import CRITERIA, SparseMask, criterion, imp, load_baked, prunable, snip, weights_digest

pytestmark = pytest.mark.usefixtures('one_thread')

def block(): return nn.Sequential(nn.Linear(8, 8), nn.ReLU())

def net(wrap=lambda module: module, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[wrap(block()) for _ in range(3)])

def train(model, steps=3, lr=.1, opt=None):
    opt = opt or torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.rand(4, 8)).square().sum().backward()
        opt.step()

def sgd(params): return torch.optim.SGD(params, lr=.1, momentum=.9)
def adamw(params): return torch.optim.AdamW(params, lr=.1)

def step(model, opt, run):
    opt.zero_grad()
    run().square().sum().backward()
    opt.step()

def same_where_kept(mask, a, b):
    kept = mask['1.0.weight']
    return torch.equal(a[1][0].weight[kept], b[1][0].weight[kept])

def masked(mask, model): return all((w[~mask[n]] == 0).all() for n,w in mask.weights(model).items())

# --- wrappers

def compiled(module): return torch.compile(module, backend='eager')

class FullyShardedDataParallel(nn.Module):
    "What a wrapper of FSDP looks like from outside."
    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module
    def forward(self, x): return self._fsdp_wrapped_module(x)

class DeepSpeedEngine(nn.Module):
    "A wrapper of another library, which holds what it wraps as `module`."
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, x): return self.module(x)

def both(module): return compiled(checkpoint_wrapper(module))

WRAPS = dict(compiled=compiled, checkpointed=checkpoint_wrapper, both=both, fsdp=FullyShardedDataParallel,
             engine=DeepSpeedEngine, parallel=nn.DataParallel, averaged=torch.optim.swa_utils.AveragedModel)

@pytest.mark.parametrize('wrap', WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize('where', ['blocks', 'inside blocks', 'outside', 'everywhere'])
def test_a_wrapper_is_no_part_of_a_name_at_any_depth(wrap, where):
    "A mask and a selection found on a wrapped model go on the plain one, and back, with the same names."
    plain = net()
    model = net(wrap) if where in ('blocks', 'everywhere') else net()
    if where == 'inside blocks': model[1][0] = wrap(model[1][0])
    if where in ('outside', 'everywhere'): model = wrap(model)
    assert [layer.name for layer in layers(model)] == ['0.0.weight', '1.0.weight', '2.0.weight']
    assert list(bare_parameters(model)) == list(bare_parameters(plain))
    ours,theirs = SparseMask.magnitude(model, .3),SparseMask.magnitude(plain, .3)
    assert ours == theirs and ours.info == theirs.info                  # the digest is of bare names, too
    selection = LayerSelection(['0.0.weight'], ['1.0.weight', '2.0.weight'])
    for target in (model, plain):
        with ours.apply(target): assert masked(ours, target)
        with selection.apply(target):
            assert [layer.param.requires_grad for layer in layers(target)] == [True, False, False]

@pytest.mark.parametrize('wrap', [compiled, checkpoint_wrapper], ids=['compiled', 'checkpointed'])
def test_imp_on_wrapped_blocks_finds_the_mask_of_the_plain_model(wrap):
    "Wrapping changes how a model is run, not what is found on it."
    (wrapped,_),(plain,_) = (imp(m, lambda m, r: train(m, 1), density=.5, p=.3) for m in (net(wrap), net()))
    assert wrapped == plain and wrapped.info == plain.info

def test_masks_and_selections_with_the_names_of_wrappers_still_apply(tmp_path):
    "Files of version 0.1 may hold such names; they mean the same layers."
    name = '1._orig_mod.0.weight'
    old = SparseMask({name: torch.eye(8, dtype=torch.bool),
                      '2._checkpoint_wrapped_module.0.weight': torch.ones(8, 8)})
    assert old.names == ['1.0.weight', '2.0.weight'] and name in old and old[name].sum() == 8
    model = net()
    with old.apply(model): assert (model[1][0].weight != 0).sum() == 8
    selection = LayerSelection.from_json(json.dumps(dict(train=['0._orig_mod.0.weight'], freeze=[name])))
    with selection.apply(model): assert not model[1][0].weight.requires_grad
    assert find_layers(['0._orig_mod.0.weight'], model)['0._orig_mod.0.weight'].param is model[0][0].weight

def test_state_dicts_of_wrapped_models_are_matched_by_bare_names():
    "`module.` may be anybody's name, so it is taken out only where nothing fits with it."
    mask = SparseMask.magnitude(net(), .3)
    for wrap in (compiled, checkpoint_wrapper, FullyShardedDataParallel, nn.DataParallel):
        state = net(wrap).state_dict()
        assert list(mask.apply_to_state(state).values()) == [['1.0.weight'], ['2.0.weight']]
    own = nn.ModuleDict(dict(module=net()))                             # a module of one's own of that name stays
    assert layers(own)[0].name == 'module.0.0.weight'

def test_distributed_blocks_have_bare_names(tmp_path):
    "DistributedDataParallel around one block, in a process group of one."
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        model = net()
        model[1] = nn.parallel.DistributedDataParallel(model[1])
        mask = SparseMask.magnitude(model, .3)
        assert mask == SparseMask.magnitude(net(), .3)
        with mask.apply(model):
            train(model)
            assert masked(mask, model)
    finally: dist.destroy_process_group()

@pytest.mark.parametrize('wrap', [compiled, checkpoint_wrapper, nn.DataParallel, both])
def test_a_baked_file_of_a_wrapped_model_is_as_small_and_loads(wrap, tmp_path):
    "Wrappers change the names of the state dict, each in its own way."
    model,plain = net(wrap),net()
    mask = SparseMask.magnitude(plain, .1)
    sizes = [mask.bake(m, tmp_path/'b.safetensors')['ratio'] for m in (plain, model)]
    assert sizes[0] == sizes[1]
    again = net(wrap, seed=1)
    again.load_state_dict(load_baked(tmp_path/'b.safetensors'))
    assert all(torch.equal(a, b) for a,b in zip(again.parameters(), model.parameters()))

def test_parts_and_similarities_know_wrapped_blocks_by_their_bare_names(tmp_path):
    "Everything that reads names of layers joins on the same ones."
    from opentrans.cka import cka
    from opentrans.vit.peft import add_lora, slots
    from opentrans.vit.peft_files import load_added, save_added
    model,plain = net(checkpoint_wrapper),net()
    ours,theirs = slots(model),slots(plain)
    assert list(ours) == list(theirs) and [s.kind for s in ours.values()] == [s.kind for s in theirs.values()]
    add_lora(model, ['1.0.weight'], 2)
    save_added(model, tmp_path/'parts.safetensors')
    assert list(load_added(plain, tmp_path/'parts.safetensors').parts) == ['1.0.weight']
    frame = cka(net(), net(checkpoint_wrapper), [torch.rand(16, 8)])
    assert list(frame.index) == list(frame.columns) == ['0.0.weight', '1.0.weight', '2.0.weight']
    assert np.allclose(np.diag(frame), 1)

# --- weights that are computed

def half_pruned(module): return prune.l1_unstructured(module, 'weight', .5)

COMPUTED = dict(weight_norm=parametrizations.weight_norm, old_weight_norm=nn.utils.weight_norm,
                spectral_norm=parametrizations.spectral_norm, old_spectral_norm=nn.utils.spectral_norm,
                orthogonal=parametrizations.orthogonal, prune=half_pruned)

def half_computed(how):
    model = net()
    how(model[1][0])
    return model

@pytest.mark.parametrize('how', COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_a_layer_that_masks_leave_dense_with_a_word(how):
    """Zeros that are written to it would be gone in the next pass; the warning says what to do, and so does the
    mask."""
    model = half_computed(how)
    with pytest.warns(UserWarning, match='1.0.weight is computed by .* end that first, with torch.nn.utils'):
        mask = SparseMask.magnitude(model, .3)
    assert ([layer.name for layer in layers(model)] == ['0.0.weight', '1.0.weight', '2.0.weight']
            and unread(model) == {})
    assert mask.names == ['2.0.weight'] and list(mask.info['left_dense']) == ['1.0.weight']
    with mask.apply(model):
        train(model)
        assert masked(mask, model)
    with pytest.raises(OpenTransError, match='1.0.weight is computed by') as error:
        SparseMask.ones(net()).apply(model)
    assert 'backbone' not in str(error.value)
    assert SparseMask.ones(net()).apply(model, strict=False).left == ['1.0.weight']

@pytest.mark.parametrize('how', COMPUTED.values(), ids=COMPUTED)
def test_a_selection_freezes_a_computed_weight_by_what_it_is_computed_from(how):
    "Afterwards everything is as before."
    model = half_computed(how)
    sources = [p for p in model[1][0].parameters() if p is not model[1][0].bias]
    before = [p.clone() for p in sources]
    with LayerSelection(['0.0.weight', '2.0.weight'], ['1.0.weight']).apply(model):
        assert not any(p.requires_grad for p in sources) and model[1][0].bias.requires_grad
        train(model)
    assert all(torch.equal(p, b) for p,b in zip(sources, before)) and all(p.requires_grad for p in sources)

@pytest.mark.parametrize('how', COMPUTED.values(), ids=COMPUTED)
def test_a_checkpoint_with_computed_weights_says_so(how):
    "Its tensors are parts of weights; that is not another backbone."
    state = half_computed(how).state_dict()
    mask = SparseMask.ones(net())
    with pytest.raises(OpenTransError, match='1.0.weight is computed from') as error: mask.apply_to_state(state)
    assert 'backbone' not in str(error.value)

def test_where_every_weight_is_computed_no_mask_can_be_made():
    "The error names the way out."
    model = net()
    for b in model: parametrizations.weight_norm(b[0])
    with pytest.raises(OpenTransError, match='no prunable layers.*remove_parametrizations'): SparseMask.ones(model)

def test_parametrised_attention_and_recurrent_layers_are_read_by_their_weights():
    "The key of a computed weight is the key of the weight."
    attention = parametrizations.spectral_norm(nn.MultiheadAttention(8, 2), 'in_proj_weight')
    thirds = layers(attention)[:3]
    assert [layer.name for layer in thirds] == [f'in_proj_weight[{p}]' for p in 'qkv']
    assert all(layer.computed and layer.weight.shape == (8, 8) for layer in thirds)
    split = LayerSelection(['in_proj_weight[q]'], ['in_proj_weight[k]'])
    with pytest.raises(OpenTransError, match='cannot be put on'): split.apply(attention)
    lstm = parametrizations.weight_norm(nn.LSTM(4, 6), 'weight_hh_l0')
    assert [(layer.name, bool(layer.computed)) for layer in layers(lstm)] == [
        ('weight_ih_l0', False), ('weight_hh_l0', True)]
    assert unread(lstm) == {}

# --- what is read

def is_covered(model):
    "Every weight of two axes that is no bias and no norm's is a layer, behind a layer, or listed; none is both."
    read,left = {id(p) for layer in layers(model) for p in layer.params},unread(model)
    named = {n: p for n,p in bare_parameters(model).items() if p.ndim > 1 and not n.endswith('bias')}
    listed = {id(named[n]) for n in left if n in named}
    return not read & listed and all(left.values()) and all(id(p) in read | listed for p in named.values())

def test_every_weight_is_a_layer_or_is_listed():
    "For models of four kinds, the two lists together are all weights."
    transformers = pytest.importorskip('transformers')
    size = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1,
                                        eos_token_id=1)
        mixture = transformers.MixtralConfig(num_local_experts=4, num_key_value_heads=2, **size)
        models = [transformers.GPT2LMHeadModel(small), transformers.MixtralForCausalLM(mixture),
                  nn.Sequential(nn.Embedding(9, 4), nn.GRU(4, 6), nn.RNNCell(6, 3), nn.Bilinear(3, 3, 2)),
                  nn.TransformerEncoderLayer(8, 2, 16)]
    assert all(is_covered(m) for m in models)
    gpt,mixtral,reader,_ = models
    matrices = sum(p.numel() for p in gpt.parameters() if p.ndim == 2)
    assert sum(layer.weight.numel() for layer in layers(gpt)) == matrices - gpt.transformer.wpe.weight.numel()
    assert {layer.name: layer.kind
            for layer in layers(mixtral)}['model.layers.0.mlp.experts.gate_up_proj'] == 'experts'
    assert ([layer.kind for layer in layers(reader)] == ['recurrent']*4
            and list(unread(reader)) == ['0.weight', '3.weight'])
    assert unread(nn.LayerNorm((2, 2))) == {}

def test_transposed_weights_of_gpt2_are_masked_by_outputs_and_inputs():
    "`Conv1D` keeps (inputs, outputs): a channel is a column, and 2:4 goes down the rows."
    transformers = pytest.importorskip('transformers')
    model = nn.Sequential(nn.Linear(8, 8), transformers.pytorch_utils.Conv1D(12, 8))
    mask = SparseMask.magnitude(model, .5, scope='channel')['1.weight']
    assert mask.shape == (8, 12) and mask.all(0).sum() == 6 and mask.any(0).sum() == 6
    assert (SparseMask.magnitude(model, .5, scope='2:4')['1.weight'].unflatten(0, (2, 4)).sum(1) == 2).all()
    off = ~mask.any(0)
    with SparseMask.magnitude(model, .5, scope='channel').apply(model):
        assert (model(torch.rand(3, 8))[:, off] == model[1].bias[off]).all()

@pytest.mark.parametrize('transposed', [False, True])
def test_experts_are_masked_one_by_one(transposed):
    "Each expert has outputs of its own; inputs are where the model says they are."
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.is_transposed = transposed
            self.up = nn.Parameter(torch.randn(3, 8, 4) if transposed else torch.randn(3, 4, 8))
    model = nn.Sequential(nn.Linear(2, 2), Experts())
    layer = layers(model)[1]
    assert (layer.kind, layer.groups, tuple(layer.outputs_first(layer.weight).shape)) == ('experts', 3, (12, 8))
    assert torch.equal(layer.outputs_first(layer.weight)[4:8], layer.weight[1].T if transposed else layer.weight[1])
    assert torch.equal(layer.as_stored(layer.outputs_first(layer.weight)), layer.weight)
    mask = SparseMask.magnitude(model, .5, scope='2:4')['1.up']
    by_output = mask.transpose(1, 2) if transposed else mask
    assert (by_output.unflatten(2, (2, 4)).sum(3) == 2).all()

def test_recurrent_weights_can_be_masked_and_trained():
    "Zeros stay zero in an LSTM, whose weights torch also keeps in a list of its own."
    model = nn.ModuleDict(dict(inp=nn.Linear(4, 4), lstm=nn.LSTM(4, 6), out=nn.Linear(6, 2)))
    mask = SparseMask.magnitude(model, .3)
    opt = torch.optim.Adam(model.parameters(), lr=.1)
    with mask.apply(model):
        for _ in range(3):
            step(model, opt, lambda: model['out'](model['lstm'](model['inp'](torch.rand(5, 2, 4)))[0]))
        assert mask.names == ['lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'out.weight'] and masked(mask, model)

def test_weights_that_are_no_parameters_are_listed():
    "Integer-packed modules and buffers hold weights, too."
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('qweight', torch.zeros(4, 4, dtype=torch.int32))
    assert 'buffer of torch.int32' in unread(nn.Sequential(Packed()))['0.qweight']

# --- tensors that are no plain matrix

def odd(change):
    model = net()
    model[1][0].weight = nn.Parameter(change(model[1][0].weight.detach()), requires_grad=False)
    return model

def as_codes(w): return (w*100).round().to(torch.int8)
def as_fp8(w): return w.to(torch.float8_e4m3fn)
def as_complex(w): return w.to(torch.complex64)
def as_sparse(w): return w.to_sparse()
def as_flat(w): return w.flatten()

def with_a_lazy_layer():
    model = net()
    model[1][0] = nn.LazyLinear(8)
    return model

MAKERS = dict(magnitude=lambda m: SparseMask.magnitude(m, .5), random=lambda m: SparseMask.random(m, .5),
              ones=SparseMask.ones, by=lambda m: SparseMask.by('magnitude', m, .5),
              imp=lambda m: imp(m, lambda m: None, density=.5, p=.5)[0])

@pytest.mark.parametrize('change', [as_codes, as_sparse, as_flat])
def test_what_holds_no_ordinary_numbers_is_left_dense_with_a_word(change):
    """Codes without their scales are no magnitudes; the other layers are masked, and a mask for all is refused by
    name."""
    model = odd(change)
    for make in MAKERS.values():
        with pytest.warns(UserWarning, match='1.0.weight'): mask = make(model)
        assert mask.names == ['2.0.weight'] and '1.0.weight' in mask.info['left_dense']
    with pytest.raises(OpenTransError, match='1.0.weight'): SparseMask.ones(net()).apply(model)

@pytest.mark.parametrize('change', [as_fp8, as_complex])
def test_small_floats_and_complex_numbers_have_magnitudes(change):
    "A mask can be made of them and put on them."
    model = odd(change)
    mask = SparseMask.magnitude(model, .5)
    assert mask.names == ['1.0.weight', '2.0.weight'] and mask.density == .5 and len(mask.info['weights']) == 16
    before = model[1][0].weight.detach().clone()
    mask.apply(model).remove()
    w,k = model[1][0].weight.detach(),mask['1.0.weight']
    if change is as_fp8: w,before = w.float(),before.float()
    assert (w[~k] == 0).all() and torch.equal(w[k], before[k])

def test_a_lazy_layer_is_an_error_that_says_what_to_do():
    "A mask without it would lack a layer as soon as the model has run."
    model = with_a_lazy_layer()
    for make in (*MAKERS.values(), SparseMask.ones(net()).apply):
        with pytest.raises(OpenTransError, match='1.0.weight is not initialised yet: run the model'): make(model)
    model(torch.rand(2, 8))
    assert len(SparseMask.magnitude(model, .5)) == 2
    # a lazy head beside the tower disturbs nothing
    model = nn.Sequential(net(), nn.LazyLinear(3))
    with SparseMask.magnitude(net(), .5).apply(model): assert (model[0][1][0].weight == 0).any()

@pytest.mark.parametrize('train, freeze', [(['1.0.weight'], ['2.0.weight']), (['2.0.weight'], ['1.0.weight'])])
def test_a_lazy_layer_is_neither_trained_nor_frozen(train, freeze):
    "Its parameter is replaced by the first batch; until then nothing is changed."
    model = with_a_lazy_layer()
    with pytest.raises(OpenTransError, match='1.0.weight is not initialised yet: run the model'):
        LayerSelection(train, freeze).apply(model)
    assert all(param.requires_grad for param in model.parameters())
    model(torch.rand(2, 8))
    with LayerSelection(train, freeze).apply(model):
        assert [name for name,param in model.named_parameters() if not param.requires_grad] == freeze

def test_weights_without_values_can_be_masked_before_they_are_loaded():
    "Structure is there on the meta device; magnitudes are not. A mask in force waits for the values."
    plain,mask = net(),SparseMask.magnitude(net(), .5)
    with torch.device('meta'): model = net()
    for name in ('magnitude', 'by', 'imp'):
        with pytest.raises(OpenTransError, match='1.0.weight has no values yet.*load the weights'):
            MAKERS[name](model)
    assert SparseMask.random(model, .5) == SparseMask.random(plain, .5) and len(SparseMask.ones(model)) == 2
    with mask.apply(model):
        model.load_state_dict(plain.state_dict(), assign=True)
        assert masked(mask, model) and same_where_kept(mask, model, plain)
    with torch.device('meta'): model = net()
    with mask.apply(model):
        model.to_empty(device='cpu')
        for p in model.parameters(): nn.init.ones_(p)
        train(model)
        assert masked(mask, model)

def test_weights_spread_over_processes_are_one_clear_error(tmp_path):
    "FSDP2 makes DTensors; whole layers can still be frozen."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        mask = SparseMask.magnitude(net(), .3)
        model = net()
        mesh = init_device_mesh('cpu', (1,))
        for b in model: fully_shard(b, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for act in (*MAKERS.values(), mask.apply, mask.weights,
                    lambda m: mask.apply_to_state(dict(m.state_dict()))):
            with pytest.raises(OpenTransError, match='spread over processes'): act(model)
        with LayerSelection(['0.0.weight'], ['1.0.weight']).apply(model):
            assert not layers(model)[1].param.requires_grad
        late = net()
        with pytest.raises(OpenTransError, match='no longer in force.*spread over processes'), mask.apply(late):
            fully_shard(late, mesh=mesh)
            train(late, 1)
    finally:
        dist.destroy_process_group()
        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'): os.environ.pop(name, None)

def test_a_selection_says_what_cannot_learn():
    "Before anything is changed."
    model = odd(as_codes)
    model[2][0].weight.requires_grad_(False)
    with pytest.raises(OpenTransError, match='1.0.weight holds numbers that have no gradient'):
        LayerSelection(['1.0.weight', '2.0.weight'], []).apply(model)
    assert not model[2][0].weight.requires_grad
    with LayerSelection(['2.0.weight'], ['1.0.weight']).apply(model): assert model[2][0].weight.requires_grad

# --- the digest

def test_the_digest_does_not_depend_on_the_layout_in_memory():
    "channels_last, also where a kernel of one place makes the layout ambiguous; sliced and transposed storage."
    convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 3), nn.Conv2d(1, 4, 3))
    digest = weights_digest(layers(convs))
    assert weights_digest(layers(copy.deepcopy(convs).to(memory_format=torch.channels_last))) == digest
    odd_strides = copy.deepcopy(convs)
    for c in odd_strides: c.weight.data = torch.stack([c.weight.data, c.weight.data], -1)[..., 0]
    assert weights_digest(layers(odd_strides)) == digest
    assert len(SparseMask.magnitude(convs.to(memory_format=torch.channels_last), .5)) == 3

def test_the_digest_of_ordinary_weights_is_the_one_that_mask_files_hold():
    "It is sha256 over name and bytes; written down once, so that no change goes unseen."
    lin = nn.Linear(3, 2)
    with torch.no_grad(): lin.weight.copy_(torch.arange(6.).view(2, 3))
    import hashlib
    told = hashlib.sha256(b'weight' + np.arange(6, dtype=np.float32).tobytes()).hexdigest()[:16]
    assert weights_digest(layers(lin)) == told == '070b1a8812e28f09'

@pytest.mark.parametrize('dtype',
                         [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                          torch.complex64, torch.int8, torch.bool])
def test_every_type_has_a_digest(dtype):
    "It changes with the values and not with the layout."
    def of(w):
        lin = nn.Linear(3, 2)
        lin.weight = nn.Parameter(w, requires_grad=False)
        return weights_digest(layers(lin))
    w = torch.tensor([[1., 0, 1], [0, 1, 1]]).to(dtype)
    assert of(w) == of(w.T.contiguous().T) != of((w.float() == 0).to(dtype) if not w.is_complex() else w*2)

# --- one trunk

def test_the_classifier_of_a_librarys_model_is_its_head():
    "torchvision, timm and transformers are asked; a layer of one's own that is called `fc` stays in the trunk."
    torchvision,timm,transformers = (pytest.importorskip(p) for p in ('torchvision', 'timm', 'transformers'))
    vision,tiny = torchvision.models,transformers.ResNetConfig(depths=[1]*4, hidden_sizes=[8]*4, embedding_size=8)
    with torch.device('meta'):
        told = [(vision.resnet18(), ['fc.weight']), (vision.convnext_tiny(), ['classifier.2.weight']),
                (vision.swin_t(), ['head.weight']), (vision.vgg11(), [f'classifier.{i}.weight' for i in (0, 3, 6)]),
                (timm.create_model('resnet18'), ['fc.weight']), (timm.create_model('resnet18', num_classes=0), []),
                (timm.create_model('convnext_atto'), ['head.fc.weight']),
                (timm.create_model('deit_tiny_distilled_patch16_224'), ['head.weight', 'head_dist.weight']),
                (nn.Sequential(nn.Identity(), timm.create_model('resnet18')), ['1.fc.weight']),
                (transformers.ResNetForImageClassification(tiny), ['classifier.1.weight']),
                (nn.ModuleDict(dict(fc=nn.Linear(2, 2), classifier=nn.Linear(2, 2))), [])]
    for model,head in told:
        kept = {layer.name for layer in trunk(model)}
        assert [layer.name for layer in layers(model) if layer.name not in kept] == head, type(model).__name__
        if len(kept) > 2: assert {layer.name for layer in prunable(model)} == kept - {layers(model)[0].name}

TOWERS = {'shapes-rn': 'attnpool', 'shapes-convnext': 'head.proj.weight', 'shapes-vit': None}

@pytest.mark.parametrize('name,head', TOWERS.items(), ids=TOWERS)
def test_masks_and_trunk_mean_the_same_layers_in_the_towers_that_come_with_the_package(name, head):
    "What a mask leaves dense is the first layer and the head, and the head is no part of the trunk."
    from opentrans.clip import ClipBackbone
    tower = ClipBackbone.create(name)
    names,first = [layer.name for layer in trunk(tower)],layers(tower)[0].key
    assert [layer.name for layer in prunable(tower)] == [n for n in names if n.split('[')[0] != first] != names
    left = [layer.name for layer in layers(tower) if layer.name not in names]
    assert bool(left) == bool(head) and all(n.startswith(head) for n in left)

def test_skip_overrides_what_the_head_is():
    "An empty tuple leaves nothing out; names, paths and patterns do what they say."
    model = nn.ModuleDict(dict(a=net(), head=nn.Linear(8, 2)))
    assert [len(trunk(model, skip)) for skip in (None, (), 'head', ('a.1',), ('a.*',), ('1',))] == [
        3, 4, 3, 3, 1, 3]
    assert head_of(model) == HEADS

# --- a mask stays in force

@pytest.fixture
def found():
    model = net()
    return model,SparseMask.magnitude(model, .3)

def dense(seed=7): return {k: v.clone() for k,v in net(seed=seed).state_dict().items()}

@pytest.mark.parametrize('assign', [False, True])
def test_loaded_weights_are_masked_at_once(found, assign):
    "Before a step, after steps, and through a part of the model."
    model,mask = found
    with mask.apply(model):
        model.load_state_dict(dense(), assign=assign)
        assert masked(mask, model) and same_where_kept(mask, model, net(seed=7))
        train(model)
        assert masked(mask, model)
        model[1].load_state_dict(net(seed=8)[1].state_dict(), assign=assign)
        assert masked(mask, model)
        model(torch.rand(4, 8)).sum().backward()
        assert (model[1][0].weight.grad[~mask['1.0.weight']] == 0).all()
    assert masked(mask, model)
    model.load_state_dict(dense())
    assert not masked(mask, model)                                             # out of force

def fresh(): return nn.Parameter(torch.randn(8, 8))

REPLACED = dict(parameter=lambda m: setattr(m[1][0], 'weight', fresh()),
                written=lambda m: m[1][0]._parameters.update(weight=fresh()),
                layer=lambda m: setattr(m[1], '0', nn.Linear(8, 8)),
                block=lambda m: m.__setitem__(1, block()),
                slipped_in=lambda m: m._modules.update({'1': block()}),
                wrapped_block=lambda m: m.__setitem__(1, compiled(block())),
                data=lambda m: setattr(m[1][0].weight, 'data', torch.randn(8, 8)),
                copied=lambda m: m[1][0].weight.data.copy_(torch.randn(8, 8)),
                filled=lambda m: m[1][0].weight.detach().fill_(1.))

@pytest.mark.parametrize('replace', REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize('make', [sgd, adamw])
def test_what_takes_the_place_of_a_weight_is_masked(found, replace, make):
    "A new parameter, layer or block under the same name, whoever put it there; the mask belongs to the place."
    model,mask = found
    with mask.apply(model):
        train(model, opt=make(model.parameters()))
        replace(model)
        train(model, opt=make(model.parameters()))
        assert masked(mask, model) and (mask.weights(model)['1.0.weight'] != 0).any()
    assert masked(mask, model)

def test_a_parameter_that_is_set_is_masked_before_any_step(found):
    "No pass runs on weights that the mask forbids."
    model,mask = found
    with mask.apply(model):
        model[1][0].weight = nn.Parameter(torch.randn(8, 8))
        assert masked(mask, model)
        with pytest.raises(OpenTransError, match='in force on 1.0.weight.*shape'):
            model[1][0].weight = nn.Parameter(torch.randn(4, 8))
        assert model[1][0].weight.shape == (8, 8)                              # nothing was changed

@pytest.mark.parametrize('make', [sgd, adamw])
def test_one_pruned_weight_that_is_written_between_steps_is_zeroed(make):
    "The sample that a step looks at may miss it; that the weight was written to is seen."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
    mask = SparseMask.magnitude(model, .3)
    opt = make(model.parameters())
    with mask.apply(model):
        train(model, opt=opt)
        for i in (~mask['2.weight']).flatten().nonzero().flatten()[:40]:
            with torch.no_grad(): model[2].weight.view(-1)[i] = 1.
            train(model, 1, opt=opt)
            assert masked(mask, model)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('overwrite', [False, True])
def test_conversions_keep_the_mask(found, dtype, overwrite):
    "Also where torch is told to make new parameters."
    model,mask = found
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        with mask.apply(model):
            model.to(dtype)
            assert masked(mask, model) and model[1][0].weight.dtype == dtype
            train(model.float())
            assert masked(mask, model)
    finally: torch.__future__.set_overwrite_module_params_on_conversion(False)

@pytest.mark.parametrize('how', COMPUTED.values(), ids=COMPUTED)
def test_a_parametrization_that_is_put_on_later_is_an_error(found, how):
    "In the next step before it moves anything, and at the end of the block at the latest."
    model,mask = found
    with pytest.raises(OpenTransError,
                       match='no longer in force on 1 layers: 1.0.weight is computed'), mask.apply(model):
        how(model[1][0])
        before = [p.detach().clone() for p in model.parameters()]
        try: train(model, 1)
        finally: assert all(torch.equal(p, b) for p,b in zip(model.parameters(), before))
    model = net()
    with pytest.raises(OpenTransError, match='no longer in force'), mask.apply(model): how(model[1][0])
    model = net()
    # an error of the block is not covered up
    with pytest.raises(KeyError), mask.apply(model):
        how(model[1][0])
        raise KeyError

def end_weight_norm(module): nn.utils.parametrize.remove_parametrizations(module, 'weight')

ENDED = dict(weight_norm=(parametrizations.weight_norm, end_weight_norm),
             old_weight_norm=(nn.utils.weight_norm, nn.utils.remove_weight_norm),
             spectral_norm=(nn.utils.spectral_norm, nn.utils.remove_spectral_norm))

@pytest.mark.parametrize('how,end', ENDED.values(), ids=ENDED)
def test_a_parametrization_that_comes_and_goes_between_steps_leaves_the_mask_in_force(found, how, end):
    "What is made a parameter again is masked."
    model,mask = found
    with mask.apply(model):
        how(model[1][0])
        end(model[1][0])
        train(model)
        assert masked(mask, model)

def test_tied_weights_stay_masked_when_one_of_them_is_replaced():
    "Two places, one parameter; then two."
    model = net()
    model[2][0].weight = model[1][0].weight
    mask = SparseMask.magnitude(model, .3)
    assert mask.names == ['1.0.weight']
    with mask.apply(model):
        model[2][0].weight = nn.Parameter(torch.randn(8, 8))
        train(model)
        assert all(torch.equal(b[0].weight == 0, ~mask['1.0.weight']) for b in model[1:])

def test_a_block_that_is_wrapped_under_a_mask_keeps_it(found):
    "The parameters are the same ones; nothing is lost or done twice."
    model,mask = found
    with mask.apply(model):
        train(model)
        model[1],model[2] = compiled(model[1]),checkpoint_wrapper(model[2])
        train(model)
        assert masked(mask, model)
    assert not model[1]._orig_mod[0].weight._post_accumulate_grad_hooks

def test_copies_of_a_masked_model_are_free(found):
    "A copy has the zeros, and loads what it is given."
    model,mask = found
    with mask.apply(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert masked(mask, twin)
            twin.load_state_dict(dense())
            assert not masked(mask, twin) and masked(mask, model)

def test_a_mask_that_was_applied_and_forgotten_dies_with_its_model():
    "And it is in force as long as the model lives, though nobody holds its handle."
    model = net()
    mask,n = SparseMask.magnitude(model, .3),len(step_hooks)
    mask.apply(nn.ModuleDict(dict(backbone=model)))
    train(model)
    assert masked(mask, model)
    gone = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(p() is not None for p in gone)
    # the next hook sweeps those that are over
    after_step({}).remove()
    assert len(step_hooks) == n

def test_a_selection_that_was_applied_and_forgotten_dies_with_its_model():
    "Rows of a packed projection are frozen by hooks, too."
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    names = [layer.name for layer in layers(model)]
    LayerSelection(names[:1], names[1:]).apply(model)
    gone = weakref.ref(model[0].in_proj_weight)
    del model
    gc.collect()
    assert gone() is None

def attend(module, x): return module(x, x, x)[0]

def test_frozen_rows_keep_what_was_loaded_after_the_selection():
    "A run that is resumed loads its weights under the selection."
    model = nn.ModuleDict(dict(a=nn.MultiheadAttention(8, 2)))
    other = copy.deepcopy(model)
    with torch.no_grad(): other['a'].in_proj_weight.mul_(2)
    with LayerSelection(['a.in_proj_weight[q]'], ['a.in_proj_weight[k]', 'a.in_proj_weight[v]']).apply(model):
        model.load_state_dict(other.state_dict())
        opt = torch.optim.SGD(model.parameters(), lr=.1, weight_decay=.1)
        step(model, opt, lambda: attend(model['a'], torch.rand(3, 2, 8)))
        stays = (model['a'].in_proj_weight == other['a'].in_proj_weight).all(1)
        assert stays[8:].all() and not stays[:8].any()

def test_masks_and_selections_on_the_same_packed_weight_agree():
    """Frozen rows are put back as they were before the step, with the zeros that the mask made since, in either
    order."""
    for mask_first in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
        mask = SparseMask.magnitude(model, .3)
        selection = LayerSelection(['1.in_proj_weight[q]'], ['1.in_proj_weight[k]', '1.in_proj_weight[v]'])
        first,second = (mask, selection) if mask_first else (selection, mask)
        with first.apply(model), second.apply(model):
            opt = adamw(model.parameters())
            for _ in range(3): step(model, opt, lambda: attend(model[1], model[0](torch.rand(3, 2, 8))))
            assert masked(mask, model)

# --- criteria

def losses(model):
    for i in range(2): yield model(torch.rand(4, 8, generator=torch.Generator().manual_seed(i))).square().sum()

def test_every_registered_criterion_works_in_one_shot_and_in_rounds():
    "By its name, with the same losses; one round without training is the one shot."
    for name in CRITERIA:
        if name == 'units': continue # of towers: tests/test_heads.py
        model = net()
        shot = SparseMask.by(name, model, .5, losses=losses)
        rounds,_ = imp(model, lambda m: None, density=.5, p=.5, criterion=name, losses=losses)
        assert rounds == shot and rounds.info['criterion'] == name == shot.info['method']
        assert rounds.info['losses'] == 'losses'

def test_a_criterion_is_told_what_it_takes():
    "A function of the model alone, of model and losses in any spelling, or one that takes what chooses the layers."
    def alone(model): return {layer.name: layer.weight.abs() for layer in layers(model)}
    def with_losses(model, batches): return snip(model, batches)
    def choosing(model, losses=None, only=('*',)):
        return {layer.name: layer.weight.abs() for layer in prunable(model, only=only)}
    model = net()
    assert SparseMask.by(alone, model, .5).kept
    assert SparseMask.by(with_losses, model, .5, losses) == SparseMask.by('snip', model, .5, losses)
    mask,_ = imp(model, lambda m: None, density=.5, p=.5, criterion=choosing, only=('2.*',))
    assert mask.names == ['2.0.weight']

def test_a_criterion_can_be_registered_under_another_name():
    "Its function need not be called so."
    @criterion('halves')
    def first_half(model, losses=None, **kwargs):
        return {layer.name: torch.linspace(1, 0, layer.weight.numel()).view(layer.weight.shape)
                for layer in prunable(model, **kwargs)}
    try: assert SparseMask.by('halves', net(), .5, scope='layer')['1.0.weight'][:4].all()
    finally: del CRITERIA['halves']

def test_masks_found_by_training_say_the_number_of_threads(tmp_path):
    "Sums in training are rounded by it; a mask of given weights is the same on any number."
    mask,_ = imp(net(), lambda m, r: train(m, 1), density=.5, p=.5)
    mask.save(tmp_path/'m.safetensors')
    assert SparseMask.load(tmp_path/'m.safetensors').info['threads'] == torch.get_num_threads()
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512))
    n = torch.get_num_threads()
    masks = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            masks.append([SparseMask.magnitude(model, .1, scope=scope) for scope in ('global', 'layer', 'channel')])
    finally: torch.set_num_threads(n)
    assert masks[0] == masks[1] and 'threads' not in masks[0][0].info
