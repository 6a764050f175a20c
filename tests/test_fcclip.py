"FC-CLIP beside its released code, on CLIP's other towers, through training with a mask, and from files."
# Run as a script, this file asks the released code: python tests/test_fcclip.py FOLDER KIND OUT.safetensors
import os, subprocess, sys, types
import open_clip
import pytest
import torch
import torch.nn.functional as F
from opentrans.clip import ClipBackbone, small_clip, small_config
from opentrans.errors import OpenTransError
from opentrans.files import load_tensors, save_tensors
from opentrans.data import ShapesWorld, Vocabulary
from opentrans.training import evaluate, finetune, Recipe
from opentrans.frameworks import build, check_framework
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.fcclip import embed_masks, geometric_ensemble, load_fcclip
from opentrans.pruning import SparseMask
from opentrans.towers import cell_means

TINY = dict(hidden=64, mask_dim=32, queries=8, pixel_layers=1, layers=3, heads=2, pixel_ffn=32, ffn=32, points=128)
SIZES = dict(hidden=64, mask_dim=64, queries=11, pixel_layers=2, layers=4, heads=8, pixel_ffn=96, ffn=80)
TRAIN = ['red star,star', 'blue disc', 'grass,lawn', 'sand']
TEST = ['star', 'blue square,blue disc', 'sky', 'sand,beach,ground', 'water']
THINGS = [True, True, False, False, False]

def a_clip(vision, words, layers=1):
    "An open_clip model with a small text encoder, and the same random weights each time."
    torch.manual_seed(0)
    text = open_clip.model.CLIPTextCfg(context_length=16, vocab_size=words, width=64, heads=2, layers=layers)
    return open_clip.model.CLIP(64, vision, text)

def open_clip_of(kind):
    "(open_clip model, tokenizer): a small CLIP with random weights that matter everywhere."
    config = small_config('shapes-rn')
    config['vision_cfg'].update(width=8)
    model,tokenizer = small_clip(config, seed=0)
    if kind == 'convnext':
        model = a_clip(dict(timm_model_name='convnext_atto', timm_model_pretrained=False, timm_pool='',
                            timm_proj='linear', image_size=64), len(tokenizer))
    torch.manual_seed(1)
    with torch.no_grad():
        for name,parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith('weight') and not parameter.any(): parameter.fill_(.5)
    return model.eval(),tokenizer

def backbone_of(kind): return ClipBackbone.from_model(*open_clip_of(kind), kind)

# --- beside the released code

def import_released(folder):
    "Its packages without the data sets, which want more packages, and without the compiled operator."
    for name in ('fcclip', 'fcclip.modeling'):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [os.path.join(folder, *name.split('.'))]
    sys.modules['MultiScaleDeformableAttention'] = types.ModuleType('MultiScaleDeformableAttention')

def released_backbone(kind, model, tokenizer):
    "The released backbone on a model; its own constructor would download weights."
    from fcclip.modeling.backbone.clip import CLIP
    backbone = CLIP.__new__(CLIP)
    torch.nn.Module.__init__(backbone)
    backbone.clip_model,backbone.text_tokenizer = model,tokenizer
    backbone.model_name,backbone.model_type = dict(rn='RN-small').get(kind, kind),dict(rn='resnet').get(kind, kind)
    # the code's own is written for a transformer with the batch in the middle, as open_clip had then
    def encode_text(text, normalize=False): return model.encode_text(text, normalize=normalize)
    backbone.encode_text = encode_text
    return backbone

def released_head(shapes, embed_dim):
    "The released head, at the sizes of `SIZES`."
    from fcclip.modeling.meta_arch.fcclip_head import FCCLIPHead
    from fcclip.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
    from fcclip.modeling.transformer_decoder.fcclip_transformer_decoder import MultiScaleMaskedTransformerDecoder
    hidden,mask_dim = SIZES['hidden'],SIZES['mask_dim']
    pixels = MSDeformAttnPixelDecoder(
        shapes, transformer_dropout=0., transformer_nheads=8, transformer_dim_feedforward=SIZES['pixel_ffn'],
        transformer_enc_layers=SIZES['pixel_layers'], conv_dim=hidden, mask_dim=mask_dim, norm='GN',
        transformer_in_features=['res3', 'res4', 'res5'], common_stride=4)
    masker = MultiScaleMaskedTransformerDecoder(
        hidden, True, num_classes=4, hidden_dim=hidden, num_queries=SIZES['queries'], nheads=8,
        dim_feedforward=SIZES['ffn'], dec_layers=SIZES['layers'], pre_norm=False, mask_dim=mask_dim,
        enforce_input_project=False, clip_embedding_dim=embed_dim)
    return FCCLIPHead(shapes, num_classes=4, pixel_decoder=pixels, transformer_predictor=masker,
                      transformer_in_feature='multi_scale_pixel_decoder')

def metadata(names):
    "What the released code knows of a data set."
    things = {i: i for i,thing in enumerate(THINGS) if thing}
    return types.SimpleNamespace(stuff_classes=names, thing_classes=names, thing_dataset_id_to_contiguous_id=things)

def released_framework(kind):
    "The released FC-CLIP from its own parts with random weights, and a backbone of ours with the same."
    from detectron2.layers import ShapeSpec
    from fcclip.fcclip import FCCLIP
    model,tokenizer = open_clip_of(kind)
    ours = ClipBackbone.from_model(model, tokenizer, kind)
    shapes = {name: ShapeSpec(channels=c, stride=ours.strides[name]) for name,c in ours.channels.items()}
    torch.manual_seed(2)
    head = released_head(shapes, ours.embed_dim)
    mean,std = ([255*value for value in colour] for colour in (ours.origin.mean, ours.origin.std))
    theirs = FCCLIP(
        backbone=released_backbone(kind, model, tokenizer), sem_seg_head=head, criterion=None,
        num_queries=SIZES['queries'], object_mask_threshold=0., overlap_threshold=.1,
        train_metadata=metadata(TRAIN), test_metadata=metadata(TEST), size_divisibility=32,
        sem_seg_postprocess_before_inference=True, pixel_mean=mean, pixel_std=std, semantic_on=True,
        panoptic_on=True, instance_on=False, test_topk_per_image=10,
        geometric_ensemble_alpha=.4, geometric_ensemble_beta=.8, ensemble_on_valid_mask=kind == 'rn').eval()
    with torch.no_grad():
        for parameter in [*head.parameters(), *theirs.void_embedding.parameters()]:
            parameter.add_(.05*torch.randn_like(parameter))
    return theirs,ours

def all_layers(theirs, ours, images):
    "What the first classifier says in training, layer by layer, for the words of training."
    below,right = (-side % 32 for side in images.shape[2:])
    features = theirs.backbone(F.pad((images-ours.mean)/ours.std, (0, right, 0, below)))
    words,count = theirs.train().get_text_classifier()
    nothing = F.normalize(theirs.void_embedding.weight, dim=-1)
    features['text_classifier'],features['num_templates'] = torch.cat([words, nothing]),count
    every = theirs.sem_seg_head(features)
    return [*every['aux_outputs'], every]

@torch.no_grad()
def ask_the_released_code(folder, kind, out):
    "Run the released FC-CLIP, and write down weights, images and results."
    import_released(folder)
    theirs,ours = released_framework(kind)
    images = torch.rand(2, 3, 75, 130)
    said = {f'weights/{name}': tensor for name,tensor in theirs.state_dict().items()} | dict(images=images)
    for i,image in enumerate(images):
        result = theirs([dict(image=255*image)])[0]
        segments,info = result['panoptic_seg']
        kinds = torch.full((len(info)+1,), 255)
        for segment in info: kinds[segment['id']] = segment['category_id']
        said[f'semantic/{i}'] = result['sem_seg']
        said[f'panoptic/{i}'] = torch.stack([kinds[segments.long()], segments.long()], -1)
    for i,layer in enumerate(all_layers(theirs, ours, images)):
        said[f'classes/{i}'],said[f'masks/{i}'] = layer['pred_logits'],layer['pred_masks']
    save_tensors({name: tensor.contiguous().clone() for name,tensor in said.items()}, out)

REFERENCE = os.environ.get('OPENTRANS_FCCLIP', '')

@pytest.fixture(scope='module', params=['rn', 'convnext'])
def released(request, tmp_path_factory):
    "(what the released code says, our framework with its weights)"
    if not os.path.isdir(os.path.join(REFERENCE, 'fcclip')):
        pytest.skip("OPENTRANS_FCCLIP names no folder with the released code (bytedance/fc-clip)")
    pytest.importorskip('detectron2', reason='the released code needs detectron2')
    out = tmp_path_factory.mktemp('fcclip')/'released.safetensors'
    # in a process of its own: it registers names that Mask2Former's code registers, too
    command = [sys.executable, __file__, REFERENCE, request.param, str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    said = load_tensors(out)[0]
    backbone = backbone_of(request.param)
    seg = build('fcclip', backbone, vocabulary=TRAIN, seed=5, templates='vild', overlap=.1, **SIZES).eval()
    weights = {name.removeprefix('weights/'): w for name,w in said.items() if name.startswith('weights/')}
    table = load_fcclip(seg, weights)
    assert table[table.here.str.startswith('head.')].what.eq('loaded').all()
    assert table.loc['void_embedding.weight', 'here'] == 'nothing'
    left = table.index[table.what == 'left']
    assert not any('visual' in name for name in left), 'the image tower fits and is not loaded'
    return said,seg

def near(ours, theirs, share=1e-4): return (ours - theirs).abs().max() < share*theirs.abs().max()

def test_layers_are_the_released_codes(released):
    "Every layer's class logits, for words with synonyms, and masks: 1e-4 of the largest."
    said,seg = released
    words = seg.text()
    with torch.no_grad(): out = seg.head(seg.features(said['images'])[0], every=True)
    assert len(out) == SIZES['layers']+1
    for i,(queries,masks) in enumerate(out):
        assert near(seg.classify(queries, words), said[f'classes/{i}']) and near(masks, said[f'masks/{i}']), i

def segments_of(panoptic):
    "Class and number of each segment."
    return {tuple(segment) for segment in panoptic.flatten(0, 1).unique(dim=0).tolist()}

def test_output_is_the_released_codes(released):
    "Both classifiers, ensemble, synonyms, seen and new classes, padding: scores to 1e-4, the same segments."
    said,seg = released
    words,images = seg.text(TEST),said['images']
    assert words.seen.tolist() == [True, True, False, True, False]
    with torch.no_grad():
        scores = seg(images, words)
        segments = seg.predict(images, TEST, kind='panoptic', isthing=THINGS)
    for i in range(2):
        theirs = said[f'panoptic/{i}']
        assert near(scores[i], said[f'semantic/{i}'])
        assert (segments[i, ..., 0] == theirs[..., 0]).float().mean() > .999
        assert len(segments_of(segments[i])) == len(segments_of(theirs))
    words.seen[:] = False
    with torch.no_grad(): other = seg(images, words)[0]
    assert not near(other, said['semantic/0'], 1e-3), 'the test does not see which classes are seen'

# --- the equations

def test_ensemble_is_its_equations():
    "The released code's lines, term by term, where it has numbers; and numbers where it has none."
    generator = torch.Generator().manual_seed(0)
    for classes in (1, 3, 150):
        inside = torch.randn(2, 6, classes+1, generator=generator)*8
        outside = torch.randn(2, 6, classes, generator=generator)*8
        seen,valid = torch.rand(classes, generator=generator) > .5,torch.rand(2, 6, generator=generator) > .3
        p,q = inside[..., :-1].double().softmax(-1),outside.double().softmax(-1)
        a,b = (weight*valid[..., None].double() for weight in (.4, .8))
        mixed = (p**(1-a)*q**a).log()*seen + (p**(1-b)*q**b).log()*(~seen)
        void = inside.double().softmax(-1)[..., -1:]
        theirs = (torch.cat([mixed.softmax(-1)*(1-void), void], -1) + 1e-8).log()
        assert (geometric_ensemble(inside, outside, seen, .4, .8, valid) - theirs).abs().max() < 1e-3
    far = torch.tensor([[[300., -300, 0, 0]]])
    p = far[..., :-1].softmax(-1)
    assert not ((p**.6*p**.4).log()*torch.tensor([1, 0, 1])).isfinite().all()
    assert geometric_ensemble(far, far[..., :-1], torch.tensor([True, False, True])).isfinite().all()

# --- other towers

def a_vit():
    text = tiny_backbone().text
    model = a_clip(dict(layers=4, width=64, head_width=32, patch_size=16, image_size=64), len(text.tokenizer))
    return ClipBackbone.from_model(model, text.tokenizer, 'vit')

TOWERS = dict(convnext=lambda: backbone_of('convnext'), vit=a_vit,
              os16=lambda: ClipBackbone.create('shapes-rn', output_stride=16))

@pytest.mark.parametrize('tower', list(TOWERS))
def test_masks_on_other_towers(tower):
    "Embeddings of masks, of empty ones too; both kinds of output; and a step of training reaches the tower."
    clip = TOWERS[tower]()
    seg = build('fcclip', clip, vocabulary=['red star', 'grass'], preset='small', seed=0, **TINY).eval()
    images = torch.rand(2, 3, 75, 96, generator=torch.Generator().manual_seed(0))
    masks = torch.randn(2, 5, 24, 24, generator=torch.Generator().manual_seed(1))
    masks[0, 3] = -1.
    with torch.no_grad():
        embedded,valid = embed_masks(clip, seg.features(images)[1], masks)
        scores = seg(images, seg.text())
    assert embedded.shape == (2, 5, clip.embed_dim) and embedded.isfinite().all() and scores.isfinite().all()
    assert valid.tolist()[0] == [True]*3+[False, True]
    assert seg.predict(images, kind='panoptic').shape == (2, 75, 96, 2)
    losses = seg.train().loss(dict(images=images, labels=torch.randint(2, (2, 75, 96))))
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.any() for p in clip.parameters())

def test_contract_on_a_convnext():
    assert len(check_framework('fcclip', backbone=backbone_of('convnext'), **TINY)) == 10

# --- through training

def test_one_mask_from_file_through_training(tmp_path):
    "A mask saved before the framework was built holds through training; synonyms and other domains are evaluated."
    world,clip = ShapesWorld(n=8, size=48),tiny_backbone()
    SparseMask.magnitude(clip.tower, .1).save(tmp_path/'mask.safetensors')
    mask = SparseMask.load(tmp_path/'mask.safetensors')
    seg = build('fcclip', clip.fresh_copy(), vocabulary=world.vocabulary, preset='small', seed=0, **TINY)
    with mask.apply(seg.backbone):
        finetune(seg, world, Recipe.tiny().replace(iterations=2, batch_size=4))
        kept = sum(int(w.count_nonzero()) for w in mask.weights(seg).values())
    assert kept <= mask.kept and kept > .99*mask.kept
    val = ShapesWorld('val', n=3, size=48)
    result = evaluate(seg, val, kind='panoptic')
    assert set(result['groups']) == {'base', 'novel'} and 0 <= result['miou'] <= 1 and 0 <= result['pq'] <= 1
    seen = [name for name,known in zip(val.vocabulary, seg.text(val.vocabulary).seen) if known]
    assert seen == list(world.vocabulary), 'seen are the classes of training'
    for domain in ('night', 'sketch'):
        assert evaluate(seg, ShapesWorld('val', domain, n=2, size=48))['n_images'] == 2

def test_frozen_clip_does_not_move():
    world = ShapesWorld(n=8, size=48)
    seg = build('fcclip', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0, frozen=True, **TINY)
    before = {name: tensor.clone() for name,tensor in seg.state_dict().items()}
    finetune(seg, world, Recipe.tiny().replace(iterations=2, batch_size=4))
    after = seg.state_dict()
    moved = {name.split('.')[0] for name,tensor in before.items() if not torch.equal(tensor, after[name])}
    assert 'head' in moved and 'backbone' not in moved

def test_a_new_name_for_a_known_class_is_seen():
    "Overlap goes by words, and plain embeddings of training's classes count as them."
    trained = Vocabulary(['sofa,couch', 'grass'])
    seg = build('fcclip', tiny_backbone(), vocabulary=trained, preset='small', seed=0, **TINY).eval()
    assert seg.text(['couch', 'lawn,grass', 'cat']).seen.tolist() == [True, True, False]
    images,two = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),['grass', 'couch']
    with torch.no_grad():
        plain,named = seg(images, seg.backbone.encode_text(['grass'])),seg(images, seg.text(['grass']))
        best = seg(images, seg.text(two)).argmax(1)
    assert torch.allclose(plain, named, atol=1e-5)
    assert torch.equal(best, seg.predict(images, two))

# --- files

def test_weights_from_files(tmp_path):
    path = tmp_path/'model_final.pth'
    seg = build('fcclip', tiny_backbone(), ['grass'], preset='small', seed=0, **TINY)
    two = {'void_embedding.weight': torch.ones_like(seg.nothing),
           'sem_seg_head.predictor.logit_scale': torch.tensor(2.)}
    torch.save(dict(model=two, iteration=7), path)
    with pytest.raises(OpenTransError, match='of the head are not in it'): load_fcclip(seg, path)
    assert not seg.nothing.eq(1).all(), 'a file that does not fit has changed the framework'
    table = load_fcclip(seg, path, strict=False)
    assert seg.nothing.eq(1).all() and seg.head.log_scale.item() == 2. and (table.what == 'loaded').sum() == 2
    with pytest.raises(OpenTransError, match='No weights file'): load_fcclip(seg, tmp_path/'none.pth')

@pytest.mark.parametrize('is_mixed', [False, True])
def test_the_mean_under_a_large_mask_is_a_number_in_half_precision(is_mixed):
    "The sum of its cells is none."
    cells = torch.full((1, 2, 40, 40), 100., dtype=torch.float16, requires_grad=True)
    inside = torch.ones(1, 3, 1600, dtype=torch.bool)
    with torch.autocast('cpu', torch.float16, enabled=is_mixed): mean = cell_means(cells, inside)
    assert mean.isfinite().all() and (mean == 100).all()
    mean.sum().backward()
    assert cells.grad.isfinite().all()

if __name__ == '__main__': ask_the_released_code(*sys.argv[1:])
