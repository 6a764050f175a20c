"""Chapters one after another, as research goes: a mask, updates, training, an interruption, and what is counted and
read of it."""
import copy, pickle
import pytest
import torch
from opentrans.core import LayerSelection
from opentrans.cost import cost
from opentrans.data import ShapesWorld
from opentrans.errors import OpenTransError, OtherRun
from opentrans.frameworks import build, tiny_backbone
from opentrans.heavy_tail import analyze
from opentrans.pruning import reconstruct, SparseMask
from opentrans.sparse import compile
from opentrans.training import finetune, Recipe
from opentrans.training.finetune import load_framework
from opentrans.vit.peft import add_adapters, add_lora, add_sparse, merge_peft, slots
from opentrans.vit.peft_files import load_added, save_added

pytestmark = pytest.mark.usefixtures('one_thread')

SIZE = (3, 64, 64)
QUICK = Recipe.tiny().replace(iterations=3, batch_size=2)

@pytest.fixture(scope='module')
def data(): return ShapesWorld('train', n=4, size=64)

def small(data):
    return build('deeplabv3', tiny_backbone(), vocabulary=data.vocabulary, preset='small', width=16, seed=0)

def half(framework): return SparseMask.magnitude(framework, .5)

def holds(mask, model): return all(not weight[~mask[name]].any() for name,weight in mask.weights(model).items())

def interrupted(framework, data, folder, **kwargs):
    "Fine-tune for one of three iterations, as after a Ctrl-C."
    def stop(*_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        finetune(framework, data, QUICK, checkpoint_dir=folder, checkpoint_every=1, callback=stop, **kwargs)

# --- zeros stay

def test_dense_weights_are_loaded_under_a_mask(data, tmp_path):
    seg, dense = small(data), small(data)
    torch.save(dense.state_dict(), tmp_path/'dense.pt')
    mask = half(seg)
    with mask.apply(seg.backbone):
        load_framework(seg, tmp_path/'dense.pt')
        assert holds(mask, seg)

def test_weights_trained_beside_updates_are_loaded_under_a_mask(data, tmp_path):
    tuned, clip = tiny_backbone(), tiny_backbone()
    add_lora(tuned, 'layer1.*', r=2, freeze=False)
    save_added(tuned, tmp_path/'parts.safetensors')
    mask = half(clip)
    with mask.apply(clip):
        load_added(clip, tmp_path/'parts.safetensors')
        assert holds(mask, clip)

@pytest.mark.parametrize('masked', [False, True])
def test_a_merge_fills_no_zeros_of_a_mask_in_force(data, masked):
    seg = small(data)
    mask = half(seg)
    handle = mask.apply(seg.backbone)
    add_lora(seg.backbone, list(mask), r=2, masks=mask if masked else None, seed=0)
    finetune(seg, data, QUICK)
    if not masked:
        with pytest.raises(OpenTransError, match='would fill weights'): merge_peft(seg.backbone)
        assert holds(mask, seg)
        handle.remove()
    merge_peft(seg.backbone)
    assert holds(mask, seg) == masked

def test_a_run_under_a_mask_does_not_go_on_without(data, tmp_path):
    "The block of the mask has ended with the interruption: the same call, but outside of it."
    seg = small(data)
    mask = half(seg)
    with mask.apply(seg.backbone): interrupted(seg, data, tmp_path)
    with pytest.raises(OtherRun, match='weights_under_masks'): finetune(seg, data, QUICK, checkpoint_dir=tmp_path)
    with mask.apply(seg.backbone): assert len(finetune(seg, data, QUICK, checkpoint_dir=tmp_path)) == 3
    assert holds(mask, seg)

def test_a_run_of_some_layers_does_not_go_on_with_all(data, tmp_path):
    seg = small(data)
    names = SparseMask.ones(seg).names
    selection = LayerSelection(names[:8], names[8:])
    with selection.apply(seg): interrupted(seg, data, tmp_path)
    with pytest.raises(OtherRun, match='numbers_that_learn'): finetune(seg, data, QUICK, checkpoint_dir=tmp_path)
    with selection.apply(seg): assert len(finetune(seg, data, QUICK, checkpoint_dir=tmp_path)) == 3

def test_a_run_with_updates_goes_on_in_the_same_process(data, tmp_path):
    "Zeros are those of the weights, whatever was added to them."
    seg = small(data)
    with half(seg).apply(seg.backbone):
        add_lora(seg.backbone, r=2, seed=0)
        interrupted(seg, data, tmp_path)
        assert len(finetune(seg, data, QUICK, checkpoint_dir=tmp_path)) == 3

def test_the_order_of_freezing_and_masking_is_no_matter(data):
    "A layer that rested when the mask came learns later: no gradient of a pruned weight is in the norm that clips."
    recipe = QUICK.replace(clip_grad=.05)
    histories = []
    for rests_first in (False, True):
        seg = small(data)
        mask = half(seg)
        names = mask.names
        resting = LayerSelection([], names).apply(seg) if rests_first else None
        with mask.apply(seg.backbone):
            if rests_first: resting.remove()
            histories.append(finetune(seg, data, recipe))
    assert histories[0].equals(histories[1])

# --- what is counted, read and copied

def add_all(how, model, mask):
    if how == 'adapters': add_adapters(model, r=2, seed=0)
    elif how == 'low rank': add_lora(model, r=2, seed=0)
    elif how == 'low rank, masked': add_lora(model, r=2, seed=0, masks=mask)
    else: add_sparse(model, {name: kept for name,kept in mask.items() if name in slots(model)})

@pytest.mark.parametrize('how', ['adapters', 'low rank', 'low rank, masked', 'single weights'])
def test_the_cost_of_a_model_with_updates(how):
    "Each number counts once, and a mask makes the same weights cheaper as without updates."
    clip = tiny_backbone()
    mask = half(clip)
    plain = cost(clip, SIZE, mask=mask)
    add_all(how, clip, mask)
    tuned = cost(clip, SIZE, mask=mask)
    assert tuned.params == sum(p.numel() for p in clip.parameters())
    assert tuned.params-tuned.active_params == plain.params-plain.active_params
    assert tuned.macs-tuned.active_macs == pytest.approx(plain.macs-plain.active_macs)
    assert not any(name.startswith('(head)') for name in tuned.by_layer.index)

def test_a_compiled_model_is_not_counted():
    clip = tiny_backbone().eval()
    fast = compile(clip)
    with pytest.raises(OpenTransError, match='no counter sees'): cost(fast, SIZE)
    assert cost(clip, SIZE).macs

def test_a_change_is_read_against_a_state_of_the_whole_framework(data):
    seg = small(data)
    state = copy.deepcopy(seg.state_dict())
    before = copy.deepcopy(seg)
    finetune(seg, data, QUICK)
    want = analyze(seg, base=before).frame.alpha
    assert want.notna().any()
    assert analyze(seg, base=state).frame.alpha.equals(want)
    whole = analyze(seg.state_dict(), base=before).frame.alpha
    assert set(whole.dropna()) == set(want.dropna())
    with pytest.raises(OpenTransError, match='no partner'):
        analyze(seg, base=torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))

@pytest.mark.parametrize('how', ['adapters', 'low rank', 'single weights'])
def test_a_model_with_updates_is_pickled(how):
    clip = tiny_backbone().eval()
    add_all(how, clip, half(clip))
    again = pickle.loads(pickle.dumps(clip))
    image = torch.rand(1, *SIZE)
    with torch.no_grad(): ours,theirs = clip(image),again(image)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

# --- masks are found on a model with updates

def few_losses(data):
    "A loss of one batch, for criteria that look at gradients."
    image = data[0]['image'][None]
    def losses(model): yield model(image).square().mean()
    return losses

@pytest.mark.parametrize('criterion', ['snip', 'sensitivity'])
def test_gradients_of_weights_with_updates(data, criterion):
    "An update that is zero so far changes no score."
    tower = tiny_backbone().visual
    want = SparseMask.by(criterion, tower, .5, few_losses(data))
    add_lora(tower, r=2, seed=0)
    assert SparseMask.by(criterion, tower, .5, few_losses(data)) == want

def test_inputs_are_not_seen_beside_updates(data):
    tower = tiny_backbone().visual.eval()
    images = [data[0]['image'][None]]
    add_lora(tower, r=2, seed=0)
    with pytest.raises(OpenTransError, match='merge_peft'): reconstruct(tower, images, density=.5)
    mask,_ = reconstruct(merge_peft(tower), images, density=.5)
    assert holds(mask, tower)
