"FASeg beside its published code with the same weights, on other backbones, through training with a mask, and HRCA."
import itertools, json, types
from pathlib import Path
import pytest
from conftest import reference_head
import timm
import torch
from torch import nn
from opentrans.cost import peak_memory
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.files import load_json
from opentrans.runtime import seeded
from opentrans.data import ShapesWorld
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build, check_framework
from opentrans.frameworks.closed import build_closed
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.faseg import (
    cell_pixels, HighResCrossAttention, load_faseg, select_cells, StagedBackbone)
from opentrans.frameworks.instances import instances
from opentrans.pruning import SparseMask

root = Path(__file__).resolve().parent.parent
TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, heads=2, pixel_ffn=32, ffn=32, points=128)
STRIDES = (4, 8, 16, 32)

def maps(channels, size, seed=0):
    "Random maps of a backbone for an image of a size."
    generator,res = torch.Generator().manual_seed(seed),{}
    for (name,count),stride in zip(channels.items(), STRIDES):
        res[name] = torch.randn(1, count, size[0]//stride, size[1]//stride, generator=generator)
    return res

def near(ours, theirs, share=1e-4): return (ours - theirs).abs().max() < share*max(1., theirs.abs().max())

# --- beside the published code

@pytest.fixture(scope='module')
def reference(clone):
    "Modules of ziplab/FASeg in the folder OPENTRANS_FASEG; their operator is replaced by its own PyTorch fallback."
    get = clone('OPENTRANS_FASEG', 'ziplab/FASeg')
    core = get('pixel_decoder.ops.functions.ms_deform_attn_func').ms_deform_attn_core_pytorch
    def apply(value, shapes, start, points, weights, step): return core(value, shapes, points, weights)
    get('pixel_decoder.ops.modules.ms_deform_attn').MSDeformAttnFunction = types.SimpleNamespace(apply=apply)
    decoders = get('transformer_decoder.mask2former_transformer_decoder')
    return types.SimpleNamespace(pixel=get('pixel_decoder.msdeformattn').MSDeformAttnPixelDecoder4ScalesFASeg,
                                 decoder=decoders.MultiScaleMaskedTransformerDecoderFASeg)

@pytest.mark.parametrize('moved', [0., .02])
def test_logits_are_the_references(reference, moved):
    "Full size on RN50's maps, class and mask logits of all 14 predictions: 1e-4. The count is the thesis's."
    torch.manual_seed(0)
    channels = dict(res2=256, res3=512, res4=1024, res5=2048)
    theirs = reference_head(reference, channels, 13)
    count = sum(p.numel() for p in theirs.parameters())
    assert count - 105*257 + 23_454_912 == 50_511_639 # 255 classes, not 150
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(moved*torch.randn_like(p)*p.std().nan_to_num(1.).clamp(min=.1))
    clip = ClipBackbone.create('RN50', pretrained=None)
    seg = build('faseg', clip, ['thing', 'stuff'], preset='published').eval()
    file = {f'sem_seg_head.{name}': p for name,p in theirs.state_dict().items()}
    report = load_faseg(seg, file)
    assert (report.what != 'left').all() and set(report.index) >= file.keys(), report[report.what == 'left']
    features = maps(channels, (256, 320))
    with torch.no_grad():
        fine,_,levels,codes = theirs.pixel_decoder.forward_features(features)
        out = theirs.predictor(levels, fine, pos_list_2d=codes)
        ours_fine,ours_levels,ours_codes = seg.head.pixel_decoder(features)
        ours = seg.head(features, every=True)
    for a,b in zip((ours_fine, *ours_levels, *ours_codes), (fine, *levels, *codes)):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4
    every = out['aux_outputs'] + [out]
    assert len(every) == len(ours) == 14
    for i,((classes,masks),layer) in enumerate(zip(ours, every)):
        assert near(classes, layer['pred_logits']) and near(masks, layer['pred_masks']), i

def bilinear(level, x, y):
    "The value of a map (H,W,D) between pixels, whose centres are at halves; zero outside."
    height,width = level.shape[:2]
    value = level.new_zeros(level.shape[-1])
    for row,column in itertools.product((int(y.floor()), int(y.floor())+1), (int(x.floor()), int(x.floor())+1)):
        if not (0 <= row < height and 0 <= column < width): continue
        value = value + (1-(x-column).abs())*(1-(y-row).abs())*level[row, column]
    return value

def deformable_attention(value, sizes, points, weights):
    "Deformable attention by its definition: weighted samples of each level, one after the other."
    batch,queries,heads = points.shape[:3]
    levels = value.split([height*width for height,width in sizes], 1)
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b,q,h in itertools.product(range(batch), range(queries), range(heads)):
        for i,(size,level) in enumerate(zip(sizes, levels)):
            grid = level[b, :, h].unflatten(0, size)
            for point,weight in zip(points[b, q, h, i], weights[b, q, h, i]):
                x,y = point[0]*size[1] - .5,point[1]*size[0] - .5
                out[b, q, h] = out[b, q, h] + weight*bilinear(grid, x, y)
    return out.flatten(2)

def test_deformable_attention_is_its_definition():
    "transformers' PyTorch form, which is used here, beside its definition, forward and gradient of the points."
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    torch.manual_seed(0)
    sizes,(batch,queries,heads,dim,count) = [(3, 5), (6, 4)],(2, 3, 2, 4, 2)
    pixels = sum(height*width for height,width in sizes)
    value = torch.rand(batch, pixels, heads, dim, dtype=torch.float64)
    points = 1.4*torch.rand(batch, queries, heads, len(sizes), count, 2, dtype=torch.float64) - .2 # also outside
    weights = torch.rand(batch, queries, heads, len(sizes), count, dtype=torch.float64)
    points.requires_grad_()
    expected = deformable_attention(value, sizes, points, weights)
    got = multi_scale_deformable_attention(value, sizes, points, weights)
    assert (got - expected).abs().max() < 1e-10
    direction = torch.randn_like(expected)
    def gradient(out): return torch.autograd.grad((out*direction).sum(), points, retain_graph=True)[0]
    ours,theirs = gradient(got),gradient(expected)
    assert (ours - theirs).abs().max() < 1e-9

def test_deformable_attention_is_the_compiled_one():
    "transformers' PyTorch form, which is used here, beside the compiled operator, where that is installed."
    op = pytest.importorskip('MultiScaleDeformableAttention', reason='the compiled operator is not installed')
    if not hasattr(op, 'ms_deform_attn_forward') or not torch.cuda.is_available():
        pytest.skip('the compiled deformable attention needs its operator and a GPU')
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    torch.manual_seed(0)
    sizes = [(4, 6), (8, 12)]
    value,points = torch.randn(2, 120, 4, 8).cuda(),torch.rand(2, 9, 4, 2, 3, 2).cuda()
    weights = torch.rand(2, 9, 4, 2, 3).cuda()
    shapes,starts = torch.tensor(sizes).cuda(),torch.tensor([0, 24]).cuda()
    theirs = op.ms_deform_attn_forward(value, shapes, starts, points, weights, 64)
    assert (multi_scale_deformable_attention(value, sizes, points, weights) - theirs).abs().max() < 1e-5

# --- HRCA

@pytest.mark.parametrize('seed', range(12))
def test_hrca_is_masked_cross_attention(seed):
    "For random sizes and ratios: full attention with -inf on all other pixels, in float64, forward and back."
    generator = torch.Generator().manual_seed(seed)
    def draw(low, high): return int(torch.randint(low, high, (1,), generator=generator))
    height = draw(1, 5)
    width = draw(1, 6)
    cell = draw(1, 5)
    queries,batch = draw(1, 6),draw(1, 4)
    torch.manual_seed(seed)
    hrca = HighResCrossAttention(8, 2).double()
    def randn(*size): return torch.randn(batch, *size, dtype=torch.float64)
    x,query_pos = randn(queries, 8),randn(queries, 8)
    fine,fine_pos = randn(8, height*cell, width*cell).requires_grad_(),randn(8, height*cell, width*cell)
    low,ratio = torch.rand(batch, queries, height*width, dtype=torch.float64),draw(1, 8)
    keys,values = (fine + fine_pos).flatten(2).mT,fine.flatten(2).mT
    for selection in ('cells', 'pixels', 'random'):
        with seeded(seed): out,attn,idx = hrca(x, fine, fine_pos, low, query_pos, ratio, selection)
        assert idx.shape[1] == attn.shape[-1] == max(1, height*width//ratio)*cell**2
        assert all(len(set(row.tolist())) == len(row) for row in idx)
        blocked = torch.ones(batch, height*width*cell**2, dtype=torch.bool).scatter(1, idx, False)
        by_head = blocked[:, None].expand(-1, queries, -1).repeat_interleave(2, 0)
        expected,weights = nn.MultiheadAttention.forward(hrca, x + query_pos, keys, values, attn_mask=by_head)
        assert (out - expected).abs().max() < 1e-10
        assert (weights.gather(2, idx[:, None].expand(-1, queries, -1)) - attn).abs().max() < 1e-10
        inputs = [fine, *hrca.parameters()]
        ours,theirs = (torch.autograd.grad(o.square().sum(), inputs, retain_graph=True) for o in (out, expected))
        assert all((a - b).abs().max() < 1e-9 for a,b in zip(ours, theirs))
        assert (ours[0].flatten(2).mT[blocked] == 0).all()

def test_cells_lie_where_they_should():
    "Each fine pixel belongs to the coarse one that lies over it, for maps that are not square."
    height = 3
    width = 5
    cell = 4
    coarse = torch.arange(height*width).view(height, width)
    owner = coarse.repeat_interleave(cell, 0).repeat_interleave(cell, 1).flatten()
    for i in range(height*width):
        pixels = cell_pixels(torch.tensor([[i]]), (height*cell, width*cell), cell)[0]
        assert (owner == i).nonzero().flatten().tolist() == pixels.sort()[0].tolist()
    assert select_cells(torch.eye(height*width)[None, [7, 7, 2]], n=2).tolist() == [[7, 2]]

def test_hrca_needs_less_memory():
    "A training step at 1/4 of 256x256: less than half of what fused full attention needs."
    torch.manual_seed(0)
    hrca,queries = HighResCrossAttention(64, 4),torch.randn(1, 20, 64)
    fine = torch.randn(1, 64, 64, 64, requires_grad=True)
    codes = torch.randn(1, 64, 64, 64)
    low = torch.rand(1, 20, 64)
    def by_hrca(): hrca(queries, fine, codes, low, queries, need_weights=False)[0].sum().backward()
    def by_all():
        values = fine.flatten(2).mT
        keys = values + codes.flatten(2).mT
        nn.MultiheadAttention.forward(hrca, queries, keys, values, need_weights=False)[0].sum().backward()
    few,full = peak_memory(by_hrca),peak_memory(by_all)
    assert few < .5*full, (few, full)

def test_committed_benchmark():
    "The stored run at 1/4 of 512x512: HRCA takes less time and memory than full attention, also in the decoder."
    stored = load_json(root/'benchmarks'/'bench_hrca.json')
    layer = stored['layer']
    assert {'command', 'processor', 'torch', 'threads'} <= set(stored['run']) and layer['gap'] < 1e-5
    for rows in (layer['inference'], layer['training'], stored['decoder']):
        least = rows['HRCA']['mib']
        others = [row for way,row in rows.items() if way != 'HRCA']
        assert all(row['ratio'] > 1.5 and row['mib'] > 1.2*least for row in others), rows

def test_committed_study():
    "Five seeds of the main comparison, at least three of each variant, all of one size, with command and versions."
    from opentrans.vit import faseg_study as study
    stored = load_json(root/'docs'/'results'/'faseg-5seeds.json')
    assert {'command', 'date', 'processor', 'torch', 'cpu_minutes'} <= set(stored['run'])
    assert stored['scale'] == json.loads(json.dumps(study.SCALE))
    for arm,(*_,main) in study.ARMS.items():
        seeds = sorted(row['seed'] for row in stored['results'] if row['arm'] == arm)
        assert seeds == list(range(5 if main else study.FEW)), arm

# --- other backbones

def test_convolutional_encoder():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    encoder = timm.create_model('test_resnet', features_only=True, out_indices=(-4, -3, -2, -1))
    check_framework('faseg', StagedBackbone(encoder, tiny_backbone()), **TINY)

def test_windowed_transformer():
    "Swin of transformers, with its own names for the mask."
    from transformers import SwinBackbone, SwinConfig
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.,
        out_features=[f'stage{i}' for i in (1, 2, 3, 4)])
    backbone = StagedBackbone(SwinBackbone(config), tiny_backbone())
    assert backbone.channels == dict(res2=8, res3=16, res4=32, res5=64)
    seg = build('faseg', backbone, ['red star', 'grass'], preset='small', seed=0, **TINY)
    mask = SparseMask.magnitude(seg.tower, .3)
    assert any(word in name for name in mask.names for word in ('mlp', 'intermediate', 'fc1'))
    optimizer = torch.optim.AdamW(seg.parameters(), lr=1e-3)
    batch = dict(images=torch.rand(2, 3, 64, 96), labels=torch.randint(2, (2, 64, 96)))
    with mask.apply(seg):
        sum(seg.loss(batch).values()).backward()
        optimizer.step()
        assert_pruned(seg, mask)
    assert seg.predict(torch.rand(1, 3, 70, 50)).shape == (1, 70, 50)

def assert_pruned(seg, mask, when=''):
    for name,parameter in seg.tower.named_parameters():
        if name in mask: assert not parameter[~mask[name]].any(), (name, when)

class LastChannels(nn.Module):
    "Four maps whose channels come last."
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8*(i+1), stride, stride) for i,stride in enumerate(STRIDES))

    def forward(self, x): return [convolve(x).permute(0, 2, 3, 1) for convolve in self.convs]

def test_channels_last_encoder():
    "A map whose channels come last is turned."
    backbone = StagedBackbone(LastChannels(), tiny_backbone())
    assert backbone.channels == dict(res2=8, res3=16, res4=24, res5=32)
    assert backbone(torch.rand(1, 3, 32, 64))['res4'].shape == (1, 24, 2, 4)

# --- training

class Stop(Exception):
    "A run is interrupted."

def test_trains_under_a_mask_and_goes_on(tmp_path):
    "Interrupted and resumed, a run ends with the weights of one that was not; pruned weights are 0 at every step."
    data = ShapesWorld('train', 'night', n=8, size=64, seed=0)
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    mask = SparseMask.magnitude(clip.tower, .1)
    recipe = Recipe.tiny().replace(iterations=4, batch_size=2, seed=0)
    def watch(seg, row): assert_pruned(seg, mask, row)
    def stop(seg, row):
        watch(seg, row)
        if row['iteration'] == 2: raise Stop
    def train(callback, **options):
        seg = build('faseg', clip.fresh_copy(), data.vocabulary, preset='small', seed=0, **TINY)
        finetune(seg, data, recipe, mask=mask, callback=callback, device='cpu', **options)
        return seg
    whole,resumable = train(watch),dict(checkpoint_dir=tmp_path, checkpoint_every=2)
    with pytest.raises(Stop): train(stop, **resumable)
    once,parts = whole.state_dict(),train(watch, **resumable).state_dict()
    def same(name): return torch.allclose(once[name].float(), parts[name].float(), atol=1e-5)
    apart = [name for name in once if not same(name)]
    assert not apart, apart[:4]
    few = ShapesWorld('val', 'night', n=4, size=64, seed=0)
    assert evaluate(whole, few)['miou'] == evaluate(whole, few)['miou']

def test_the_closed_model_is_trained_and_evaluated():
    "On an encoder of timm, by the usual fine-tuning and evaluation, semantic and thing by thing."
    data, few = (ShapesWorld(split, 'night', n=4, size=64, seed=0) for split in ('train', 'val'))
    torch.manual_seed(0)
    encoder = timm.create_model('test_resnet', features_only=True, out_indices=(1, 2, 3, 4))
    seg = build_closed(encoder, data.vocabulary, 'small', seed=0, **TINY)
    recipe = Recipe.paper('faseg').replace(iterations=2, batch_size=2, seed=0, crop=64)
    before = seg.head.class_embed.weight.clone()
    history = finetune(seg, data, recipe, device='cpu')
    assert history.loss.notna().all() and not torch.equal(seg.head.class_embed.weight, before)
    assert 0 <= evaluate(seg, data)['miou'] <= 1
    found = instances(seg, torch.stack([data[i]['image'] for i in range(2)]), isthing=[
        k in data.things for k in range(len(data.vocabulary))])
    assert len(found) == 2 and all(set(one.classes.tolist()) <= set(data.things) for one in found)
    with pytest.raises(OpenTransError, match='and no others'): seg.predict(few[0]['image'][None], ['a', 'b'])

OPTIONS = (dict(dfpq=False), dict(hrca=False), dict(dfpq='anchor', selection='pixels'),
           dict(key_pos='sine', hrca_query='dynamic'), dict(key_pos='learned', selection='rcda'))

@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_every_weight_learns(options):
    "One backward pass reaches every parameter of the head."
    torch.manual_seed(0)
    seg = build('faseg', tiny_backbone(), ['a', 'b', 'c'], preset='small', seed=0, ratio=2, **TINY, **options)
    with torch.no_grad(): # attention weights of the deformable attention begin at zero
        for parameter in seg.head.parameters(): parameter.add_(.01*torch.randn_like(parameter))
    batch = dict(images=torch.rand(2, 3, 64, 64), labels=torch.randint(3, (2, 64, 64)))
    sum(seg.loss(batch).values()).backward()
    still = [name for name,p in seg.head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
