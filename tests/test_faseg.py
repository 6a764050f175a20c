"FASeg beside its published code with the same weights, on backbones that are no CLIP, through training with a mask, and HRCA on maps of many sizes."
import json, types
from pathlib import Path
import pytest
import torch
from torch import nn
from opentrans.cost import peak_memory
from opentrans.clip import ClipBackbone
from opentrans.files import load_json
from opentrans.runtime import seeded
from opentrans.data import ShapesWorld
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build, check_framework
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.faseg import FASegDecoder, FASegPixelDecoder, HighResCrossAttention, StagedBackbone, cell_pixels, load_faseg, select_cells
from opentrans.pruning import SparseMask

root = Path(__file__).resolve().parent.parent
TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, heads=2, pixel_ffn=32, ffn=32, points=128)

def maps(channels, size, b=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(b, c, size[0]//s, size[1]//s, generator=g) for (k,c),s in zip(channels.items(), (4, 8, 16, 32))}

# --- beside the published code

@pytest.fixture(scope='module')
def reference(clone):
    "Modules of ziplab/FASeg, whose folder OPENTRANS_FASEG names; its compiled operator is replaced by its own PyTorch fallback."
    get = clone('OPENTRANS_FASEG', 'ziplab/FASeg')
    core = get('pixel_decoder.ops.functions.ms_deform_attn_func').ms_deform_attn_core_pytorch
    get('pixel_decoder.ops.modules.ms_deform_attn').MSDeformAttnFunction = types.SimpleNamespace(apply=lambda value, shapes, start, at, weights, step: core(value, shapes, at, weights))
    return types.SimpleNamespace(pixel=get('pixel_decoder.msdeformattn').MSDeformAttnPixelDecoder4ScalesFASeg, decoder=get('transformer_decoder.mask2former_transformer_decoder').MultiScaleMaskedTransformerDecoderFASeg)

@pytest.mark.parametrize('moved', [0., .02])
def test_logits_are_the_references(reference, moved):
    "Full size on the maps of RN50, class and mask logits of all 14 predictions: 1e-4. With the weights of a beginning, and with weights that are not. The count is the thesis's."
    from detectron2.layers import ShapeSpec
    torch.manual_seed(0)
    channels = dict(res2=256, res3=512, res4=1024, res5=2048)
    shapes = {k: ShapeSpec(channels=c, stride=s) for (k,c),s in zip(channels.items(), (4, 8, 16, 32))}
    pixel = reference.pixel(shapes, transformer_dropout=0., transformer_nheads=8, transformer_dim_feedforward=1024, transformer_enc_layers=6, conv_dim=256, mask_dim=256, norm='GN',
                            transformer_in_features=['res3', 'res4', 'res5'], common_stride=4)
    masker = reference.decoder(256, True, num_classes=255, hidden_dim=256, num_queries=100, nheads=8, dim_feedforward=2048, dec_layers=13, pre_norm=False, mask_dim=256, enforce_input_project=False)
    theirs = nn.ModuleDict(dict(pixel_decoder=pixel, predictor=masker)).eval()
    assert sum(p.numel() for p in theirs.parameters()) - 105*257 + 23_454_912 == 50_511_639 # 255 classes, not 150
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(moved*torch.randn_like(p)*p.std().nan_to_num(1.).clamp(min=.1))
    seg = build('faseg', ClipBackbone.create('RN50', pretrained=None), ['thing', 'stuff'], preset='published').eval()
    report = load_faseg(seg, {f'sem_seg_head.{n}': p for n,p in theirs.state_dict().items()})
    assert (report.what != 'left').all() and set(report.index) >= {f'sem_seg_head.{n}' for n in theirs.state_dict()}, report[report.what == 'left']
    f = maps(channels, (256, 320))
    with torch.no_grad():
        fine,_,levels,codes = theirs.pixel_decoder.forward_features(f)
        out = theirs.predictor(levels, fine, pos_list_2d=codes)
        ours_fine,ours_levels,ours_codes = seg.head.pixel_decoder(f)
        ours = seg.head(f, every=True)
    assert (ours_fine - fine).abs().max() < 1e-4
    for a,b in zip((*ours_levels, *ours_codes), (*levels, *codes)): assert a.shape == b.shape and (a - b).abs().max() < 1e-4
    every = out['aux_outputs'] + [out]
    assert len(every) == len(ours) == 14
    for i,((c,m),o) in enumerate(zip(ours, every)): assert (c - o['pred_logits']).abs().max() < 1e-4*max(1., o['pred_logits'].abs().max()) and (m - o['pred_masks']).abs().max() < 1e-4*max(1., o['pred_masks'].abs().max()), i

def test_deformable_attention_is_its_definition():
    "transformers' PyTorch form, which is used here, beside loops: weighted bilinear samples of each level, zero outside, pixel centres at halves; to 1e-10, forward and gradient of the points."
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    torch.manual_seed(0)
    sizes,(b,q,heads,dim,points) = [(3, 5), (6, 4)],(2, 3, 2, 4, 2)
    value,at,w = (torch.rand(*s, dtype=torch.float64) for s in ((b, sum(y*x for y,x in sizes), heads, dim), (b, q, heads, len(sizes), points, 2), (b, q, heads, len(sizes), points)))
    at = (1.4*at - .2).requires_grad_() # also outside
    want = [[[0]*heads for _ in range(q)] for _ in range(b)]
    for n in range(b):
        for i in range(q):
            for h in range(heads):
                for l,(H,W) in enumerate(sizes):
                    v = value[n, sum(y*x for y,x in sizes[:l]):][:H*W, h].unflatten(0, (H, W))
                    for k in range(points):
                        x,y = at[n, i, h, l, k, 0]*W - .5, at[n, i, h, l, k, 1]*H - .5
                        for r in (int(y.floor()), int(y.floor())+1):
                            for c in (int(x.floor()), int(x.floor())+1):
                                if 0 <= r < H and 0 <= c < W: want[n][i][h] = want[n][i][h] + w[n, i, h, l, k]*(1-(y-r).abs())*(1-(x-c).abs())*v[r, c]
    want = torch.stack([torch.stack([torch.cat([o + value.new_zeros(dim) for o in hs]) for hs in qs]) for qs in want])
    got = multi_scale_deformable_attention(value, sizes, at, w)
    assert (got - want).abs().max() < 1e-10
    g = torch.randn_like(want)
    a,c = (torch.autograd.grad((o*g).sum(), at, retain_graph=True)[0] for o in (got, want))
    assert (a - c).abs().max() < 1e-9

def test_deformable_attention_is_the_compiled_one():
    "transformers' PyTorch form, which is used here, beside the compiled operator, where that is installed."
    op = pytest.importorskip('MultiScaleDeformableAttention', reason='the compiled deformable attention is not installed')
    if not hasattr(op, 'ms_deform_attn_forward') or not torch.cuda.is_available(): pytest.skip('the compiled deformable attention needs its operator and a GPU')
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    torch.manual_seed(0)
    sizes = [(4, 6), (8, 12)]
    value,at,w = torch.randn(2, 120, 4, 8).cuda(),torch.rand(2, 9, 4, 2, 3, 2).cuda(),torch.rand(2, 9, 4, 2, 3).cuda()
    shapes = torch.tensor(sizes).cuda()
    theirs = op.ms_deform_attn_forward(value, shapes, torch.tensor([0, 24]).cuda(), at, w, 64)
    assert (multi_scale_deformable_attention(value, sizes, at, w) - theirs).abs().max() < 1e-5

# --- HRCA

@pytest.mark.parametrize('seed', range(12))
def test_hrca_is_masked_cross_attention(seed):
    "For random sizes, ratios and selections: full attention with -inf on all other pixels, in float64 to 1e-10, forward and backward."
    g = torch.Generator().manual_seed(seed)
    r = lambda a, b: int(torch.randint(a, b, (1,), generator=g))
    h,w,cell,q,b = r(1, 5), r(1, 6), r(1, 5), r(1, 6), r(1, 4)
    torch.manual_seed(seed)
    hrca = HighResCrossAttention(8, 2).double()
    x,qp,f,kp = (torch.randn(b, *s, dtype=torch.float64) for s in ((q, 8), (q, 8), (8, h*cell, w*cell), (8, h*cell, w*cell)))
    f.requires_grad_()
    low,ratio = torch.rand(b, q, h*w, dtype=torch.float64),r(1, 8)
    for selection in ('cells', 'pixels', 'random'):
        with seeded(seed): out,attn,idx = hrca(x, f, kp, low, qp, ratio, selection)
        assert idx.shape[1] == max(1, h*w//ratio)*cell**2 == attn.shape[-1] and all(len(set(i.tolist())) == len(i) for i in idx)
        blocked = torch.ones(b, h*w*cell**2, dtype=torch.bool).scatter(1, idx, False)
        want,weights = nn.MultiheadAttention.forward(hrca, x + qp, (f + kp).flatten(2).mT, f.flatten(2).mT, attn_mask=blocked[:, None].expand(-1, q, -1).repeat_interleave(2, 0))
        assert (out - want).abs().max() < 1e-10 and (weights.gather(2, idx[:, None].expand(-1, q, -1)) - attn).abs().max() < 1e-10
        mine,theirs = (torch.autograd.grad(o.square().sum(), [f, *hrca.parameters()], retain_graph=True) for o in (out, want))
        assert all((a - c).abs().max() < 1e-9 for a,c in zip(mine, theirs)) and (mine[0].flatten(2).mT[blocked] == 0).all()

def test_cells_lie_where_they_should():
    "Each fine pixel belongs to the coarse one that lies over it, for maps that are not square."
    h,w,c = 3, 5, 4
    owner = torch.arange(h*w).view(h, w).repeat_interleave(c, 0).repeat_interleave(c, 1).flatten()
    for i in range(h*w): assert (owner == i).nonzero().flatten().tolist() == cell_pixels(torch.tensor([[i]]), (h*c, w*c), c)[0].sort()[0].tolist()
    assert select_cells(torch.eye(h*w)[None, [7, 7, 2]], n=2).tolist() == [[7, 2]]

def test_hrca_needs_less_memory():
    "A training step at 1/4 of 256x256: less than half of what fused full attention needs."
    torch.manual_seed(0)
    hrca = HighResCrossAttention(64, 4)
    q,f,p,low = torch.randn(1, 20, 64), torch.randn(1, 64, 64, 64, requires_grad=True), torch.randn(1, 64, 64, 64), torch.rand(1, 20, 64)
    few = peak_memory(lambda: hrca(q, f, p, low, q, need_weights=False)[0].sum().backward())
    v = lambda: f.flatten(2).mT
    full = peak_memory(lambda: nn.MultiheadAttention.forward(hrca, q, v() + p.flatten(2).mT, v(), need_weights=False)[0].sum().backward())
    assert few < .5*full, (few, full)

def test_committed_benchmark():
    "The stored run at 1/4 of 512x512: HRCA takes less time and less memory than full attention, in inference and training, alone and in the decoder."
    d = load_json(root/'benchmarks'/'bench_hrca.json')
    assert {'command', 'processor', 'torch', 'threads'} <= set(d['run']) and d['layer']['gap'] < 1e-5
    for rows in (d['layer']['inference'], d['layer']['training'], d['decoder']):
        assert all(r['ratio'] > 1.5 and r['mib'] > 1.2*rows['HRCA']['mib'] for k,r in rows.items() if k != 'HRCA'), rows

def test_committed_study():
    "Five seeds of the main comparison, at least three of each variant, all of one size, with command, date and versions."
    d = load_json(root/'docs'/'results'/'faseg-5seeds.json')
    from opentrans.vit import faseg_study as study
    assert {'command', 'date', 'processor', 'torch', 'cpu_minutes'} <= set(d['run']) and d['scale'] == json.loads(json.dumps(study.SCALE))
    seeds = {a: sorted(r['seed'] for r in d['results'] if r['arm'] == a) for a in study.ARMS}
    assert all(s == list(range(5 if study.ARMS[a][3] else study.FEW)) for a,s in seeds.items()), seeds

# --- other backbones

def test_convolutional_encoder():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    check_framework('faseg', StagedBackbone(timm.create_model('test_resnet', features_only=True, out_indices=(-4, -3, -2, -1)), tiny_backbone()), **TINY)

def test_windowed_transformer():
    "Swin of transformers, with its own names for the mask."
    from transformers import SwinBackbone, SwinConfig
    torch.manual_seed(0)
    swin = SwinBackbone(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0., out_features=[f'stage{i}' for i in (1, 2, 3, 4)]))
    back = StagedBackbone(swin, tiny_backbone())
    assert back.channels == dict(res2=8, res3=16, res4=32, res5=64)
    seg = build('faseg', back, ['red star', 'grass'], preset='small', seed=0, **TINY)
    mask = SparseMask.magnitude(seg.tower, .3)
    assert any('mlp' in n or 'intermediate' in n or 'fc1' in n for n in mask.names)
    opt,batch = torch.optim.AdamW(seg.parameters(), lr=1e-3),dict(images=torch.rand(2, 3, 64, 96), labels=torch.randint(2, (2, 64, 96)))
    with mask.apply(seg):
        sum(seg.loss(batch).values()).backward(); opt.step()
        for n,p in seg.tower.named_parameters():
            if n in mask: assert not p[~mask[n]].any(), n
    assert seg.predict(torch.rand(1, 3, 70, 50)).shape == (1, 70, 50)

def test_channels_last_encoder():
    "A map whose channels come last is turned."
    class Last(nn.Module):
        def __init__(self): super().__init__(); self.convs = nn.ModuleList(nn.Conv2d(3, 8*i, s, s) for i,s in ((1, 4), (2, 8), (3, 16), (4, 32)))
        def forward(self, x): return [c(x).permute(0, 2, 3, 1) for c in self.convs]
    back = StagedBackbone(Last(), tiny_backbone())
    assert back.channels == dict(res2=8, res3=16, res4=24, res5=32) and back(torch.rand(1, 3, 32, 64))['res4'].shape == (1, 24, 2, 4)

# --- training

def test_trains_under_a_mask_and_goes_on(tmp_path):
    "finetune, interrupted and resumed, ends with the weights of the run that was not; pruned weights are 0 at every step; the score is the same twice."
    data = ShapesWorld('train', 'night', n=8, size=64, seed=0)
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    mask = SparseMask.magnitude(clip.tower, .1)
    recipe = Recipe.tiny().replace(iterations=4, batch_size=2, seed=0)
    def start(): return build('faseg', clip.fresh_copy(), data.vocabulary, preset='small', seed=0, **TINY)
    def watch(seg, row):
        for n,p in seg.tower.named_parameters():
            if n in mask: assert not p[~mask[n]].any(), (n, row)
    whole,parts = start(),start()
    finetune(whole, data, recipe, mask=mask, callback=watch, device='cpu')
    class Stop(Exception): pass
    def stop(seg, row):
        watch(seg, row)
        if row['iteration'] == 2: raise Stop
    with pytest.raises(Stop): finetune(parts, data, recipe, mask=mask, checkpoint_dir=tmp_path, checkpoint_every=2, callback=stop, device='cpu')
    parts = start()
    finetune(parts, data, recipe, mask=mask, checkpoint_dir=tmp_path, checkpoint_every=2, callback=watch, device='cpu')
    a,b = whole.state_dict(),parts.state_dict()
    assert all(torch.allclose(a[n].float(), b[n].float(), atol=1e-5) for n in a), [n for n in a if not torch.allclose(a[n].float(), b[n].float(), atol=1e-5)][:4]
    few = ShapesWorld('val', 'night', n=4, size=64, seed=0)
    assert evaluate(whole, few)['miou'] == evaluate(whole, few)['miou']

@pytest.mark.parametrize('options', [dict(dfpq=False), dict(hrca=False), dict(dfpq='anchor', selection='pixels'), dict(key_pos='sine', hrca_query='dynamic')], ids=str)
def test_every_weight_learns(options):
    "One backward pass reaches every parameter of the head."
    torch.manual_seed(0)
    seg = build('faseg', tiny_backbone(), ['a', 'b', 'c'], preset='small', seed=0, ratio=2, **TINY, **options)
    with torch.no_grad(): # attention weights of the deformable attention begin at zero
        for p in seg.head.parameters(): p.add_(.01*torch.randn_like(p))
    sum(seg.loss(dict(images=torch.rand(2, 3, 64, 64), labels=torch.randint(3, (2, 64, 64)))).values()).backward()
    still = [n for n,p in seg.head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
