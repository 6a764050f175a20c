"FC-CLIP beside its released code with the same weights, on CLIP's other towers, through training with a mask, and from files. Run as a script, this file asks the released code."
import os, subprocess, sys, types
import pytest
import torch
import torch.nn.functional as F
from opentrans.clip import ClipBackbone, small_clip, small_config
from opentrans.errors import OpenTransError
from opentrans.files import load_tensors, save_tensors
from opentrans.data import ShapesWorld, Vocabulary, collate
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build, check_framework
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.fcclip import embed_masks, geometric_ensemble, load_fcclip
from opentrans.pruning import SparseMask

TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, layers=3, heads=2, pixel_ffn=32, ffn=32, points=128)
SIZES = dict(hidden=64, mask_dim=64, queries=11, pixel_layers=2, layers=4, heads=8, pixel_ffn=96, ffn=80)
TRAIN,TEST = ['red star,star', 'blue disc', 'grass,lawn', 'sand'],['star', 'blue square,blue disc', 'sky', 'sand,beach,ground', 'water']
THINGS = [True, True, False, False, False]

def open_clip_of(kind):
    "(open_clip model, tokenizer): a small CLIP with random weights that matter everywhere."
    config = small_config('shapes-rn'); config['vision_cfg'].update(width=8)
    model,tokenizer = small_clip(config, seed=0)
    if kind == 'convnext':
        import open_clip
        vision = dict(timm_model_name='convnext_atto', timm_model_pretrained=False, timm_pool='', timm_proj='linear', image_size=64)
        torch.manual_seed(0)
        model = open_clip.model.CLIP(64, vision, open_clip.model.CLIPTextCfg(context_length=16, vocab_size=len(tokenizer), width=64, heads=2, layers=1))
    torch.manual_seed(1)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if p.dim() == 1 and n.endswith('weight') and not p.any(): p.fill_(.5)
    return model.eval(),tokenizer

def backbone_of(kind): return ClipBackbone.from_model(*open_clip_of(kind), kind)

# --- beside the released code

def ask_the_released_code(folder, kind, out):
    "Build the released FC-CLIP from its own parts with random weights, run it, and write down weights, images and results."
    for n in ('fcclip', 'fcclip.modeling'): sys.modules[n] = types.ModuleType(n); sys.modules[n].__path__ = [os.path.join(folder, *n.split('.'))]  # leaves out data sets, which want more packages
    sys.modules['MultiScaleDeformableAttention'] = types.ModuleType('MultiScaleDeformableAttention')        # its compiled operator: without it, the code falls back on PyTorch
    from detectron2.layers import ShapeSpec
    from fcclip.modeling.backbone.clip import CLIP
    from fcclip.modeling.meta_arch.fcclip_head import FCCLIPHead
    from fcclip.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
    from fcclip.modeling.transformer_decoder.fcclip_transformer_decoder import MultiScaleMaskedTransformerDecoder
    from fcclip.fcclip import FCCLIP
    model,tokenizer = open_clip_of(kind)
    b = CLIP.__new__(CLIP); torch.nn.Module.__init__(b)                                                      # its __init__ would download weights
    b.clip_model,b.text_tokenizer,b.model_name,b.model_type = model,tokenizer,dict(rn='RN-small').get(kind, kind),dict(rn='resnet').get(kind, kind)
    b.encode_text = lambda text, normalize=False: model.encode_text(text, normalize=normalize)               # the code's own is written for a transformer with the batch in the middle, as open_clip had then
    ours = ClipBackbone.from_model(model, tokenizer, kind)
    shapes = {k: ShapeSpec(channels=c, stride=ours.strides[k]) for k,c in ours.channels.items()}
    torch.manual_seed(2)
    s = SIZES
    pixels = MSDeformAttnPixelDecoder(shapes, transformer_dropout=0., transformer_nheads=8, transformer_dim_feedforward=s['pixel_ffn'], transformer_enc_layers=s['pixel_layers'], conv_dim=s['hidden'], mask_dim=s['mask_dim'],
                                      norm='GN', transformer_in_features=['res3', 'res4', 'res5'], common_stride=4)
    masker = MultiScaleMaskedTransformerDecoder(s['hidden'], True, num_classes=4, hidden_dim=s['hidden'], num_queries=s['queries'], nheads=8, dim_feedforward=s['ffn'], dec_layers=s['layers'], pre_norm=False,
                                                mask_dim=s['mask_dim'], enforce_input_project=False, clip_embedding_dim=ours.embed_dim)
    head = FCCLIPHead(shapes, num_classes=4, pixel_decoder=pixels, transformer_predictor=masker, transformer_in_feature='multi_scale_pixel_decoder')
    meta = lambda names: types.SimpleNamespace(stuff_classes=names, thing_classes=names, thing_dataset_id_to_contiguous_id={i: i for i,t in enumerate(THINGS) if t})
    mean,std = ([255*x for x in v] for v in (ours.origin.mean, ours.origin.std))
    theirs = FCCLIP(backbone=b, sem_seg_head=head, criterion=None, num_queries=s['queries'], object_mask_threshold=0., overlap_threshold=.1, train_metadata=meta(TRAIN), test_metadata=meta(TEST), size_divisibility=32,
                    sem_seg_postprocess_before_inference=True, pixel_mean=mean, pixel_std=std, semantic_on=True, panoptic_on=True, instance_on=False, test_topk_per_image=10,
                    geometric_ensemble_alpha=.4, geometric_ensemble_beta=.8, ensemble_on_valid_mask=kind == 'rn').eval()
    with torch.no_grad():
        for p in [*head.parameters(), *theirs.void_embedding.parameters()]: p.add_(.05*torch.randn_like(p))
        images = torch.rand(2, 3, 75, 130)
        res = {f'weights/{n}': w for n,w in theirs.state_dict().items()} | dict(images=images)
        for i,x in enumerate(images):
            r = theirs([dict(image=255*x)])[0]
            res[f'semantic/{i}'],(segments,info) = r['sem_seg'],r['panoptic_seg']
            kinds = torch.full((len(info)+1,), 255); kinds[[d['id'] for d in info]] = torch.tensor([d['category_id'] for d in info], dtype=torch.long)
            res[f'panoptic/{i}'] = torch.stack([kinds[segments.long()], segments.long()], -1)
        theirs.train()                                                                                       # the words of training, and the first classifier alone
        f = b((images-ours.mean)/ours.std) if not any(n % 32 for n in images.shape[2:]) else b(F.pad((images-ours.mean)/ours.std, (0, 30, 0, 21)))
        words,n = theirs.get_text_classifier()
        f['text_classifier'],f['num_templates'] = torch.cat([words, F.normalize(theirs.void_embedding.weight, dim=-1)]),n
        every = head(f)
        for i,l in enumerate([*every['aux_outputs'], every]): res[f'classes/{i}'],res[f'masks/{i}'] = l['pred_logits'],l['pred_masks']
    save_tensors({k: v.contiguous().clone() for k,v in res.items()}, out)

REFERENCE = os.environ.get('OPENTRANS_FCCLIP', '')

@pytest.fixture(scope='module', params=['rn', 'convnext'])
def released(request, tmp_path_factory):
    "(what the released code says, our framework with its weights)"
    if not os.path.isdir(os.path.join(REFERENCE, 'fcclip')): pytest.skip("OPENTRANS_FCCLIP names no folder with the released code (bytedance/fc-clip)")
    pytest.importorskip('detectron2', reason='the released code needs detectron2')
    out = tmp_path_factory.mktemp('fcclip')/'released.safetensors'
    r = subprocess.run([sys.executable, __file__, REFERENCE, request.param, str(out)], capture_output=True, text=True)  # a process of its own: it registers names that Mask2Former's code registers, too
    assert r.returncode == 0, r.stderr[-3000:]
    said = load_tensors(out)[0]
    seg = build('fcclip', backbone_of(request.param), vocabulary=TRAIN, seed=5, templates='vild', overlap=.1, **SIZES).eval()
    weights = {k.removeprefix('weights/'): v for k,v in said.items() if k.startswith('weights/')}
    table = load_fcclip(seg, weights)
    assert table[table.here.str.startswith('head.')].what.eq('loaded').all() and table.loc['void_embedding.weight', 'here'] == 'nothing'
    assert all('visual' not in n for n in table.index[table.what == 'left']), 'the image tower fits and is not loaded'
    return said,seg

def test_layers_are_the_released_codes(released):
    "Every layer's class logits, for words with synonyms, and masks: 1e-4 of the largest."
    said,seg = released
    words = seg.text()
    with torch.no_grad(): out = seg.head(seg.features(said['images'])[0], every=True)
    assert len(out) == SIZES['layers']+1
    for i,(e,m) in enumerate(out):
        c = seg.classify(e, words)
        assert (c - said[f'classes/{i}']).abs().max() < 1e-4*said[f'classes/{i}'].abs().max(), i
        assert (m - said[f'masks/{i}']).abs().max() < 1e-4*said[f'masks/{i}'].abs().max(), i

def test_output_is_the_released_codes(released):
    "Both classifiers, ensemble, synonyms, seen and new classes, padding: scores to 1e-4, the same segments."
    said,seg = released
    assert seg.text(TEST).seen.tolist() == [True, True, False, True, False]
    with torch.no_grad():
        scores = seg(said['images'], seg.text(TEST))
        segments = seg.predict(said['images'], TEST, kind='panoptic', isthing=THINGS)
    for i in range(2):
        theirs = said[f'semantic/{i}']
        assert (scores[i] - theirs).abs().max() < 1e-4*theirs.abs().max()
        assert (segments[i, ..., 0] == said[f'panoptic/{i}'][..., 0]).float().mean() > .999
        theirs_of = lambda s: {(c.item(), n.item()) for c,n in s.flatten(0, 1).unique(dim=0)}
        assert len(theirs_of(segments[i])) == len(theirs_of(said[f'panoptic/{i}']))
    other = seg.text(['star'] + TEST[1:]); other.seen[:] = False
    with torch.no_grad(): assert (seg(said['images'], other)[0] - said['semantic/0']).abs().max() > 1e-3*said['semantic/0'].abs().max(), 'the test does not see which classes are seen'

# --- the equations

def test_ensemble_is_its_equations():
    "The released code's lines, term by term, where it has numbers; and numbers where it has none."
    g = torch.Generator().manual_seed(0)
    for k in (1, 3, 150):
        inside,outside = torch.randn(2, 6, k+1, generator=g)*8,torch.randn(2, 6, k, generator=g)*8
        seen,valid = torch.rand(k, generator=g) > .5,torch.rand(2, 6, generator=g) > .3
        p,q = inside[..., :-1].double().softmax(-1),outside.double().softmax(-1)
        a,b = (x*valid[..., None].double() for x in (.4, .8))
        mixed = (p**(1-a)*q**a).log()*seen + (p**(1-b)*q**b).log()*(~seen)
        void = inside.double().softmax(-1)[..., -1:]
        theirs = (torch.cat([mixed.softmax(-1)*(1-void), void], -1) + 1e-8).log()
        assert (geometric_ensemble(inside, outside, seen, .4, .8, valid) - theirs).abs().max() < 1e-3
    far = torch.tensor([[[300., -300, 0, 0]]])
    p = far[..., :-1].softmax(-1)
    assert not ((p**.6*p**.4).log()*torch.tensor([1, 0, 1])).isfinite().all() and geometric_ensemble(far, far[..., :-1], torch.tensor([True, False, True])).isfinite().all()

# --- other towers

def _vit():
    import open_clip
    small = tiny_backbone()
    torch.manual_seed(0)
    model = open_clip.model.CLIP(64, dict(layers=4, width=64, head_width=32, patch_size=16, image_size=64), open_clip.model.CLIPTextCfg(context_length=16, vocab_size=len(small.text.tokenizer), width=64, heads=2, layers=1))
    return ClipBackbone.from_model(model, small.text.tokenizer, 'vit')

@pytest.mark.parametrize('tower', ['convnext', 'vit', 'os16'])
def test_masks_on_other_towers(tower):
    "Embeddings of masks, of empty ones too, and what is outside a mask does not matter where CLIP ends in a mean."
    clip = dict(convnext=lambda: backbone_of('convnext'), vit=_vit, os16=lambda: ClipBackbone.create('shapes-rn', output_stride=16))[tower]()
    seg = build('fcclip', clip, vocabulary=['red star', 'grass'], preset='small', seed=0, **TINY).eval()
    x = torch.rand(2, 3, 75, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = seg.features(x)[1]
        m = torch.randn(2, 5, 24, 24, generator=torch.Generator().manual_seed(1)); m[0, 3] = -1.
        e,valid = embed_masks(clip, last, m)
        assert e.shape == (2, 5, clip.embed_dim) and e.isfinite().all() and valid.tolist()[0] == [True]*3+[False, True]
        assert seg(x, seg.text()).isfinite().all() and seg.predict(x, kind='panoptic').shape == (2, 75, 96, 2)
    losses = seg.train().loss(dict(images=x, labels=torch.randint(2, (2, 75, 96))))
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in clip.parameters())

def test_contract_on_a_convnext(): assert len(check_framework('fcclip', backbone=backbone_of('convnext'), **TINY)) == 10

# --- through training

def test_one_mask_from_file_through_training(tmp_path):
    "A mask saved before the framework was built holds through training; evaluation takes words with synonyms and other domains, and gives segments."
    world = ShapesWorld(n=8, size=48)
    clip = tiny_backbone()
    SparseMask.magnitude(clip.tower, .1).save(tmp_path/'mask.safetensors')
    mask = SparseMask.load(tmp_path/'mask.safetensors')
    seg = build('fcclip', clip.fresh_copy(), vocabulary=world.vocabulary, preset='small', seed=0, **TINY)
    with mask.apply(seg.backbone):
        finetune(seg, world, Recipe.tiny().replace(iterations=2, batch_size=4))
        kept = sum(int(w.count_nonzero()) for w in mask.weights(seg).values())
        assert kept <= mask.kept and kept > .99*mask.kept
    val = ShapesWorld('val', n=3, size=48)
    r = evaluate(seg, val, kind='panoptic')
    assert set(r['groups']) == {'base', 'novel'} and 0 <= r['miou'] <= 1 and 0 <= r['pq'] <= 1
    seen = seg.text(val.vocabulary).seen
    assert [n for n,s in zip(val.vocabulary, seen) if s] == list(world.vocabulary), 'seen are the classes of training'
    for domain in ('night', 'sketch'): assert evaluate(seg, ShapesWorld('val', domain, n=2, size=48))['n_images'] == 2

def test_frozen_clip_does_not_move():
    world = ShapesWorld(n=8, size=48)
    seg = build('fcclip', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0, frozen=True, **TINY)
    before,head = ({k: v.clone() for k,v in m.state_dict().items()} for m in (seg.backbone, seg.head))
    finetune(seg, world, Recipe.tiny().replace(iterations=2, batch_size=4))
    assert all(torch.equal(v, before[k]) for k,v in seg.backbone.state_dict().items()), 'a frozen CLIP has been trained'
    assert not all(torch.equal(v, head[k]) for k,v in seg.head.state_dict().items())

def test_a_new_name_for_a_known_class_is_seen():
    "Overlap goes by words, and plain embeddings of training's classes count as them."
    seg = build('fcclip', tiny_backbone(), vocabulary=Vocabulary(['sofa,couch', 'grass']), preset='small', seed=0, **TINY).eval()
    assert seg.text(['couch', 'lawn,grass', 'cat']).seen.tolist() == [True, True, False]
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain,named = seg(x, seg.backbone.encode_text(['grass'])),seg(x, seg.text(['grass']))
        assert torch.allclose(plain, named, atol=1e-5)
        assert torch.equal(seg(x, seg.text(['grass', 'couch'])).argmax(1), seg.predict(x, ['grass', 'couch']))

# --- files

def test_weights_from_files(tmp_path):
    seg = build('fcclip', tiny_backbone(), vocabulary=['grass'], preset='small', seed=0, **TINY)
    w = {'void_embedding.weight': torch.ones_like(seg.nothing), 'sem_seg_head.predictor.logit_scale': torch.tensor(2.)}
    torch.save(dict(model=w, iteration=7), tmp_path/'model_final.pth')
    with pytest.raises(OpenTransError, match='2 of the|of the head are not in it'): load_fcclip(seg, tmp_path/'model_final.pth')
    assert not seg.nothing.eq(1).all(), 'a file that does not fit has changed the framework'
    table = load_fcclip(seg, tmp_path/'model_final.pth', strict=False)
    assert seg.nothing.eq(1).all() and seg.head.log_scale.item() == 2. and (table.what == 'loaded').sum() == 2
    with pytest.raises(OpenTransError, match='No weights file'): load_fcclip(seg, tmp_path/'none.pth')

if __name__ == '__main__': ask_the_released_code(*sys.argv[1:])
