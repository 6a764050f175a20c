"""Training-free methods, cost maps and detection: against the public code on copied random weights, and one mask in
all frameworks."""
import importlib.util, math, os, sys, types
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from opentrans.clip import ClipBackbone
from opentrans.data import Vocabulary
from opentrans.errors import OpenTransError
from opentrans.frameworks import build
from opentrans.frameworks.fcclip import ClassWords

# a folder with clones, each under its own name
PUBLIC = os.environ.get('OPENTRANS_PUBLIC', '')

def public(name, *parts):
    "A file of a clone; the test is skipped where there is none."
    path = Path(PUBLIC)/name/Path(*parts)
    if not PUBLIC or not path.exists():
        pytest.skip(f'OPENTRANS_PUBLIC names no folder with a clone {name} that holds {"/".join(parts)}')
    return path

class Anything(types.ModuleType):
    "A stand-in for a library that a module of the public code imports and the test does not need."
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        if name in ('MODELS', 'HEADS', 'BACKBONES'):
            return types.SimpleNamespace(register_module=lambda *a, **k: lambda cls: cls)
        return type(name, (torch.nn.Module,), {}) if name[0].isupper() else (lambda *a, **k: None)

@pytest.fixture
def load():
    """Imports one file of the public code, with stand-ins for what it imports beside torch. They are gone after the
    test, and what they stood for is back."""
    before = dict(sys.modules)
    def module(path, name, *stand_ins, package=None):
        for stand_in in stand_ins: sys.modules.setdefault(stand_in, Anything(stand_in))
        if package:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path.parent)]
            name = f'{package}.{name}'
        spec = importlib.util.spec_from_file_location(name, path)
        made = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made
    yield module
    for name in set(sys.modules) - set(before): del sys.modules[name]
    sys.modules.update(before) # a stand-in for what is installed

MMSEG = ('mmengine', 'mmengine.structures', 'mmseg', 'mmseg.models', 'mmseg.models.data_preprocessor',
         'mmseg.models.segmentors', 'mmseg.registry')

def random_vit(seed=0, quick=True, layers=4):
    "A small ViT with random weights and an attention that is far from even."
    import open_clip
    from opentrans.frameworks.contract import tiny_backbone
    small = tiny_backbone()
    vision = dict(layers=layers, width=48, head_width=12, patch_size=16, image_size=224)
    text = dict(context_length=16, vocab_size=len(small.text.tokenizer), width=32, heads=2, layers=1)
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(32, vision, open_clip.model.CLIPTextCfg(**text), quick_gelu=quick)
    with torch.no_grad():
        for p in model.visual.parameters():
            p.copy_(torch.randn_like(p)*(.15 if p.dim() > 1 else .1)
                    + (1. if p.dim() == 1 and p.mean() > .5 else 0))
    return ClipBackbone.from_model(model, small.text.tokenizer, 'random ViT', copy_weights=False)

def words_of(*counts, dim=32, seed=0):
    "Random words: so many for each class."
    embeddings = F.normalize(torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed)), dim=-1)
    ends = torch.tensor(counts).cumsum(0)
    rows = [[*range(end-n, end), *[end-1]*(max(counts)-n)] for n,end in zip(counts, ends.tolist())]
    return ClassWords(embeddings, torch.tensor(rows), None)

def their_vit(load, name, clip, seen='clip.model'):
    "SCLIP's or NACLIP's ViT with the weights of ours."
    module = load(public(name, 'clip', 'model.py'), f'{name.lower()}_model')
    vit = module.VisionTransformer(224, 16, 48, 4, 4, 32).eval()
    vit.load_state_dict(clip.visual.state_dict())
    return vit

def segmentor(module, cls, vit, words, **settings):
    "The public code's segmentor around a ViT, without what its constructor loads."
    net = types.SimpleNamespace(visual=vit,
                                encode_image=lambda x, *a, return_all=False, csa=None, **k: vit(x, return_all=True))
    query = torch.tensor([k for k,row in enumerate(words.of.tolist()) for _ in dict.fromkeys(row)])
    made = getattr(module, cls).__new__(getattr(module, cls))
    torch.nn.Module.__init__(made)
    vars(made).update(net=net, query_features=words.embeddings, query_idx=query, num_queries=len(query),
                      num_classes=len(words.of), align_corners=False, dtype=torch.float32, pamr=None,
                      area_thd=None, **settings)
    return made

def answers(model, images, meta):
    "Probabilities and labels of the public segmentor for one image."
    kept = {}
    sample = types.SimpleNamespace(metainfo=dict(ori_shape=images.shape[-2:]), set_data=kept.update)
    sys.modules['mmengine.structures'].PixelData = lambda data: data
    sys.modules[type(model).__module__].PixelData = lambda data: data
    with torch.no_grad(): model.predict(meta, [sample])
    return kept['seg_logits'], kept['pred_sem_seg'][0]

def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=atol)

@pytest.mark.parametrize('size', [(224, 224), (336, 448), (250, 301)])
@pytest.mark.parametrize('preset', ['naclip', 'naclip_voc21'])
def test_naclip_is_the_public_one(load, preset, size):
    """Probabilities within 1e-5 and the same labels: windows, cut edges, positions off the native grid, background,
    PAMR."""
    clip,words = random_vit(),words_of(3, 1, 2, 1)
    seg = build('training_free', clip, preset=preset, pamr=10 if size == (336, 448) else 0).eval()
    sys.modules['clip'],sys.modules['prompts.imagenet_template'] = Anything('clip'),Anything(
        'prompts.imagenet_template')
    load(public('NACLIP', 'pamr.py'), 'pamr')
    module = load(public('NACLIP', 'naclip.py'), 'naclip', 'prompts', *MMSEG)
    vit = their_vit(load, 'NACLIP', clip)
    vit.set_params('reduced', 'naclip', 5.)
    theirs = segmentor(module, 'NACLIP', vit, words, prob_thd=seg.threshold, logit_scale=40, slide_stride=112,
                       slide_crop=seg.crop)
    if seg.pamr: theirs.pamr = sys.modules['pamr'].PAMR(10, dilations=(8, 16))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    compare(seg, theirs, images, words)

def compare(seg, theirs, images, words):
    "Ours and theirs: probabilities of the classes, up to a factor that pixels share, and labels."
    probability,labels = answers(theirs, images, seg.backbone.prepare(images))
    with torch.no_grad():
        scores = seg.scores(images, words)
        every = scores.of_words(words.embeddings).softmax(1)[0]
        best = every[words.of].amax(1)
        close(best/best.sum(0) if 'NACLIP' in type(theirs).__name__ else best, probability)
        mine = seg.semantic(images, words)[0]
    top = best.topk(2, 0).values
    sure = (top[0]-top[1] > 1e-5) & ((top[0]-seg.threshold).abs() > 1e-5)
    assert sure.float().mean() > .98 and torch.equal(mine[sure], labels[sure])
    if seg.threshold: assert 0 < (mine == 0).float().mean() <= 1

@pytest.mark.parametrize('preset', ['sclip', 'sclip_context60'])
def test_sclip_is_the_public_one(load, preset):
    clip,words = random_vit(),words_of(3, 1, 2, 1)
    seg = build('training_free', clip, preset=preset).eval()
    sys.modules['clip'],sys.modules['prompts.imagenet_template'] = Anything('clip'),Anything(
        'prompts.imagenet_template')
    load(public('SCLIP', 'pamr.py'), 'pamr')
    module = load(public('SCLIP', 'clip_segmentor.py'), 'clip_segmentor', 'prompts', *MMSEG)
    theirs = segmentor(module, 'CLIPForSegmentation', their_vit(load, 'SCLIP', clip), words,
                       prob_thd=seg.threshold, logit_scale=seg.scale, slide_stride=112, slide_crop=224)
    compare(seg, theirs, torch.rand(1, 3, 250, 301, generator=torch.Generator().manual_seed(1)), words)

def test_sclips_rule_of_areas_is_the_public_one(load):
    "VOC-21: classes of too small an area are struck out. Embeddings are drawn so that classes differ in area."
    clip,words = random_vit(),words_of(3, 1, 2, 1, 1)
    seg = build('training_free', clip, preset='sclip_voc21', threshold=.2).eval()
    sys.modules['clip'],sys.modules['prompts.imagenet_template'] = Anything('clip'),Anything(
        'prompts.imagenet_template')
    load(public('SCLIP', 'pamr.py'), 'pamr')
    module = load(public('SCLIP', 'clip_segmentor.py'), 'clip_segmentor', 'prompts', *MMSEG)
    theirs = segmentor(module, 'CLIPForSegmentation', their_vit(load, 'SCLIP', clip), words, prob_thd=.2,
                       logit_scale=65, slide_stride=112, slide_crop=224)
    theirs.area_thd = .1
    images = torch.rand(1, 3, 224, 288, generator=torch.Generator().manual_seed(1))
    _,labels = answers(theirs, images, seg.backbone.prepare(images))
    with torch.no_grad(): mine = seg.semantic(images, words)[0]
    assert (mine == labels).float().mean() > .999

@pytest.mark.parametrize('preset', ['clearclip', 'clearclip_voc21', 'clearclip_cityscapes'])
def test_clearclip_is_the_public_one(load, preset):
    "The change of the last block, in windows that are padded on all sides."
    clip,words = random_vit(quick=False),words_of(3, 1, 2, 1)
    seg = build('training_free', clip, preset=preset).eval()
    sys.modules['prompts'],sys.modules['prompts.imagenet_template'] = Anything('prompts'),types.ModuleType(
        'prompts.imagenet_template')
    names = types.ModuleType('open_clip')
    transformer = load(public('ClearCLIP', 'open_clip', 'transformer.py'), 'transformer',
                       package='clearclip_open_clip')
    vit = transformer.VisionTransformer(224, 16, 48, 4, 4, 4., output_dim=32).eval()
    vit.load_state_dict(clip.visual.state_dict())
    names.tokenizer = names.create_model = None
    kept,sys.modules['open_clip'] = sys.modules['open_clip'],names
    try:
        module = load(public('ClearCLIP', 'clearclip_segmentor.py'), 'clearclip_segmentor', 'BLIP', 'BLIP.models',
                      'BLIP.models.blip_retrieval', 'gem', *MMSEG)
    finally: sys.modules['open_clip'] = kept
    theirs = segmentor(module, 'ClearCLIPSegmentation', vit, words, prob_thd=seg.threshold, logit_scale=50,
                       slide_stride=224, slide_crop=seg.crop, clip_type='CLIP', model_type='ClearCLIP',
                       patch_size=(16, 16), ignore_residual=True)
    theirs.net.encode_image = lambda x, model_type, ignore: vit(x, model_type, ignore)
    images = torch.rand(1, 3, 250, 301, generator=torch.Generator().manual_seed(1))
    images = images.half().float()                                      # the public code halves what it sees
    theirs.predict = types.MethodType(whole_numbers(module.ClearCLIPSegmentation.predict), theirs)
    compare(seg, theirs, images, words)

def whole_numbers(predict):
    "The public method on images that stay in single precision."
    class Image(torch.Tensor):
        def half(self): return self.as_subclass(torch.Tensor)
    def full(self, inputs, samples): return predict(self, inputs.as_subclass(Image), samples)
    return full

def test_clearclips_other_methods_are_the_public_ones(load):
    "Its code has four methods, with and without the rest of the block: on one map each."
    clip = random_vit(quick=False)
    transformer = load(public('ClearCLIP', 'open_clip', 'transformer.py'), 'transformer',
                       package='clearclip_open_clip')
    vit = transformer.VisionTransformer(224, 16, 48, 4, 4, 4., output_dim=32).eval()
    vit.load_state_dict(clip.visual.state_dict())
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for theirs,mine in dict(vanilla='clip', MaskCLIP='maskclip', SCLIP='sclip', ClearCLIP='clearclip').items():
        for residual in (True, False):
            seg = build('training_free', clip, attention=mine, residual=residual).eval()
            with torch.no_grad():
                wanted = F.normalize(vit(seg.backbone.prepare(images), theirs, not residual), dim=-1)
                (cells,_), = seg.cells(images)
            close(cells.flatten(2).mT, wanted)

@pytest.mark.parametrize('tower', ['vit', 'resnet'])
def test_maskclip_is_the_public_one(load, tower):
    "The head of MaskCLIP: its projection of a ViT's values, and of a ResNet's last map without positions."
    from opentrans.frameworks.contract import tiny_backbone
    clip = random_vit() if tower == 'vit' else tiny_backbone()
    path = public('MaskCLIP', 'mmseg', 'models', 'decode_heads', 'maskclip_head.py')
    for name in ('maskclip_public', 'maskclip_public.decode_heads'):
        sys.modules[name] = Anything(name)
        sys.modules[name].__path__ = []
    sys.modules['maskclip_public.decode_heads.decode_head'] = Anything('decode_head')
    sys.modules['maskclip_public.builder'] = Anything('builder')
    module = load(path, 'maskclip_public.decode_heads.maskclip_head', 'mmcv', 'mmcv.utils', 'mmseg', 'mmseg.utils')
    text = F.normalize(torch.randn(7, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    head = module.MaskClipHead.__new__(module.MaskClipHead)
    torch.nn.Module.__init__(head)
    vars(head).update(text_embeddings=text, vit=tower == 'vit', attn_pooling=False, pd_thresh=0., ks_thresh=0.,
                      _transform_inputs=lambda x: x)
    seg = build('training_free', clip, preset='maskclip', scale=1.).eval()
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    net = clip.visual
    def conv(linear): return torch.nn.Conv2d(1, 1, 1) if linear is None else as_conv(linear)
    with torch.no_grad():
        x = clip.prepare(images)
        if tower == 'vit':
            from opentrans.frameworks.training_free import tokens_before_last
            tokens,grid = tokens_before_last(net, x)
            # as its backbone makes the values, with `return_qkv`
            block = net.transformer.resblocks[-1]
            y = F.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)[2]
            y = F.linear(y, block.attn.out_proj.weight, block.attn.out_proj.bias) + tokens
            y = net.ln_post(y + block.mlp(block.ln_2(y)))[:, 1:].mT.unflatten(2, grid)
            head.proj = torch.nn.Conv2d(48, 32, 1, bias=False)
            head.proj.weight.copy_(net.proj.T[:, :, None, None])
            wanted = head.train(False)([y, None, None, y])
        else:
            for name in ('q_proj', 'k_proj', 'v_proj', 'c_proj'):
                setattr(head, name, as_conv(getattr(net.attnpool, name)))
            wanted = head.train(False)(clip(images)['res5'])
        close(seg(images, text), F.interpolate(wanted, size=(224, 224), mode='bilinear', align_corners=False))

def as_conv(linear):
    conv = torch.nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight.data.copy_(linear.weight.data[:, :, None, None])
    conv.bias.data.copy_(linear.bias.data)
    return conv

def test_pamr_is_the_public_one(load):
    from opentrans.frameworks.training_free import colour_affinity, refine
    pamr = load(public('NACLIP', 'pamr.py'), 'pamr')
    images,logits = torch.rand(2, 3, 60, 84),torch.randn(2, 5, 60, 84)
    for steps,dilations in ((10, (8, 16)), (3, (1, 2, 4))):
        close(refine(logits, colour_affinity(images, dilations), dilations, steps),
              pamr.PAMR(steps, dilations)(images, logits))

def test_fusion_of_experts_is_the_public_one(load):
    "FLOSS's `expert_fusion`, pixel by pixel, on probabilities of experts that agree, differ and abstain."
    from opentrans.frameworks.training_free import Experts
    path = public('FLOSS', 'mmseg', 'models', 'segmentors', 'naclip', 'naclip.py')
    for name in ('clip', 'model', 'pamr', 'prompts', 'prompts.imagenet_template'):
        sys.modules[f'floss_public.{name}'] = Anything(f'floss_public.{name}')
        sys.modules[f'floss_public.{name}'].__all__ = []
    module = load(path, 'naclip', *MMSEG, package='floss_public')
    clip = random_vit()
    some = F.normalize(torch.randn(6, 5, clip.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    seg = build('training_free', clip, preset='naclip').eval()
    images = torch.rand(1, 3, 224, 240, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = seg.scores(images, words_of(1, 1, 1, 1, 1))
        each = torch.stack([scores.of_words(e).softmax(1) for e in some])
        wanted = module.NACLIP.expert_fusion(None, each[:5], each[5])
        close(seg(images, Experts(some[:5], some[5])).exp(), wanted)

def test_a_threshold_is_named_with_its_data():
    "A preset holds the numbers of the published configuration, and says what it lacks."
    presets = type(build('training_free', random_vit())).presets
    assert presets['sclip_voc21'] == dict(presets['sclip'], scale=65., threshold=.1, area=.1)
    assert presets['clearclip_voc21']['threshold'] == .5 and presets['clearclip_context60']['threshold'] == .15
    seg = build('training_free', random_vit(), preset='naclip_context60', background=5)
    with pytest.raises(OpenTransError, match='background=5, but there are 2 classes'):
        seg.predict(torch.rand(1, 3, 64, 64), Vocabulary(['grass', 'sand']))

def test_expert_templates_have_the_least_entropy():
    "Found by hand on one image: mean entropy of the pixels that a template gives to each class."
    from opentrans.frameworks.training_free import encode_experts, expert_templates
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    seg = build('training_free', clip, scale=20.).eval()
    templates = ('a photo of a {}.', 'here is a {}.', '{}')
    names = ['grass', 'sand', 'water']
    images = torch.rand(2, 3, 64, 64)
    found,table = expert_templates(seg, [images[:1], images[1:]], names, templates, top=1)
    for template in templates:
        with torch.no_grad(): likely = seg(images, clip.encode_text(names, [template])).softmax(1)
        entropy = -(likely*likely.log()).sum(1)
        for k,name in enumerate(names):
            here = entropy[likely.argmax(1) == k]
            assert ((math.isnan(table[name][template]) and not len(here))
                    or abs(table[name][template]-here.mean().item()) < 1e-4)
    for name in names:
        assert found[name] == ([table[name].idxmin()] if table[name].notna().any() else list(templates))
    experts = encode_experts(clip, names, found, templates)
    assert experts.experts.shape == (3, 3, clip.embed_dim) and len(experts) == 3
    with pytest.raises(OpenTransError, match='no expert templates for water'):
        encode_experts(clip, names, {k: v for k,v in found.items() if k != 'water'})
    with pytest.raises(OpenTransError, match='no image'): expert_templates(seg, [], names, templates)

DETECTRON2 = ('detectron2', 'detectron2.config', 'detectron2.data', 'detectron2.layers', 'detectron2.modeling',
              'detectron2.modeling.backbone', 'detectron2.modeling.postprocessing', 'detectron2.structures',
              'detectron2.utils', 'detectron2.utils.memory', 'fvcore', 'fvcore.nn', 'fvcore.nn.weight_init')

def stand_in_detectron2():
    """What the public code takes of detectron2: decorators that do nothing, a batch of images, and its resizing of
    the result."""
    for name in DETECTRON2: sys.modules[name] = Anything(name)
    sys.modules['detectron2.config'].configurable = lambda function=None, **k: function or (lambda f: f)
    for name in ('META_ARCH_REGISTRY', 'SEM_SEG_HEADS_REGISTRY', 'BACKBONE_REGISTRY'):
        setattr(sys.modules['detectron2.modeling'], name, types.SimpleNamespace(register=lambda: lambda cls: cls))
    def images(tensors, divisible=0):
        return types.SimpleNamespace(tensor=torch.stack(tensors), image_sizes=[t.shape[-2:] for t in tensors])
    sys.modules['detectron2.structures'].ImageList = types.SimpleNamespace(from_tensors=images)
    def size(result, seen, height, width):
        return F.interpolate(result[None, :, :seen[0], :seen[1]], size=(height, width), mode='bilinear',
                             align_corners=False)[0]
    sys.modules['detectron2.modeling.postprocessing'].sem_seg_postprocess = size

def their_catseg(load, seg, text):
    "The public CAT-Seg with the weights of ours, but for what its constructor loads and reads."
    pytest.importorskip('einops', reason='the public code needs einops')
    stand_in_detectron2()
    model = load(public('CAT-Seg', 'cat_seg', 'modeling', 'transformer', 'model.py'), 'catseg_transformer')
    towers = load(public('CAT-Seg', 'cat_seg', 'third_party', 'model_vpt.py'), 'catseg_towers')
    module = load(public('CAT-Seg', 'cat_seg', 'cat_seg_model.py'), 'cat_seg_model')
    net = seg.backbone.visual
    vit = towers.VisualTransformer(224, 16, 48, 12, 4, 32, 0, 0).eval()
    weights = {}
    for name,tensor in net.state_dict().items():
        if name.endswith('attn.in_proj_weight'):
            weights.update({name.replace('in_proj', f'{part}_proj'): piece
                            for part,piece in zip('qkv', tensor.chunk(3))})
        else: weights[name] = tensor
    vit.load_state_dict(weights)
    sizes = dict(text_guidance_dim=32, text_guidance_proj_dim=16, appearance_guidance_dim=32,
                 appearance_guidance_proj_dim=16, decoder_dims=(32, 16), decoder_guidance_dims=(24, 12),
                 decoder_guidance_proj_dims=(8, 4), num_layers=2, nheads=4, hidden_dim=32, pooling_size=(2, 2),
                 feature_resolution=(24, 24), window_size=12, prompt_channel=1, pad_len=seg.head.most)
    aggregator = model.Aggregator(**sizes).eval()
    missing = aggregator.load_state_dict(seg.head.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(name.endswith('attn_mask') for name in missing.missing_keys)
    def head(features, guides):
        cells = features[:, 1:].mT.unflatten(2, (24, 24))
        return aggregator(cells, text[None, :, None].repeat(len(cells), 1, 1, 1),
                          [guides[name] for name in ('res3', 'res4', 'res5')])
    head.predictor = types.SimpleNamespace(
        clip_model=types.SimpleNamespace(encode_image=lambda x, dense: vit(x, dense)))
    made = module.CATSeg.__new__(module.CATSeg)
    torch.nn.Module.__init__(made)
    mean,std = (255*getattr(seg.backbone, name).view(3, 1, 1) for name in ('mean', 'std'))
    vars(made).update(sem_seg_head=head, size_divisibility=384, sliding_window=False, clip_resolution=(384, 384),
                      layers=[], clip_pixel_mean=mean, clip_pixel_std=std, pixel_mean=mean, pixel_std=std)
    made.upsample1,made.upsample2 = seg.upsample1,seg.upsample2
    for number in (3, 7):
        vit.transformer.resblocks[number].register_forward_hook(lambda m, _, out: made.layers.append(out))
    return made.eval()

@pytest.mark.parametrize('names, most', [(7, 0), (7, 9), (12, 9)])
def test_catseg_is_the_public_one(load, names, most):
    "Probabilities within 1e-4: fewer classes than meet, as many, and more; and the evaluation through windows."
    clip = random_vit(layers=12)
    options = dict(hidden=32, guide=16, decoder=(32, 16), decoder_guides=(8, 4), tap_guides=(24, 12), most=most)
    seg = build('catseg', clip, seed=0, **options).eval()
    with torch.no_grad():
        for name,p in seg.named_parameters():
            if 'padding' in name: p.normal_()
    text = F.normalize(torch.randn(names, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
    theirs = their_catseg(load, seg, text)
    image = torch.rand(3, 384, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs([dict(image=image*255)])[0]['sem_seg']
        close(seg(image[None], text)[0], wanted, 1e-4)
        if most == 9 and names == 7:
            theirs.sliding_window,seg.sliding = True,True
            other = torch.rand(3, 500, 700, generator=torch.Generator().manual_seed(3))
            wanted = theirs([dict(image=other*255, height=500, width=700)])[0]['sem_seg']
            close(seg(other[None], text)[0], wanted, 1e-4)

def small_convnext():
    "A small ConvNeXt CLIP with random weights, of maps with 4, 8, 16 and 32 channels or whatever timm gives it."
    clip = ClipBackbone.create('shapes-convnext', pretrained=None, seed=3)
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))*.1)
    return clip

@pytest.mark.parametrize('reject', [0, 1, 3])
def test_sed_is_the_public_one(load, monkeypatch, reject):
    """Probabilities within 1e-4, of the whole and with early rejection, from the weights of the whole model; and
    the losses."""
    pytest.importorskip('einops', reason='the public code needs einops')
    stand_in_detectron2()
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self, *a, **k: self)
    for name in ('convnext', 'model'):
        model = load(public('SED', 'sed', 'modeling', 'transformer', f'{name}.py'), name, package='sed_public')
    module = load(public('SED', 'sed', 'sed_model.py'), 'sed_model')
    clip = small_convnext()
    seg = build('sed', clip, seed=0, resolution=192, hidden=32, decoder=(32, 16, 16), decoder_guides=(8, 8, 4),
                kernels=(9, 9, 9), templates=('a {}.', 'the {}.', '{}'), reject=reject).eval()
    channels = [clip.channels[name] for name in ('res4', 'res3', 'res2')]
    aggregator = model.Aggregator(text_guidance_dim=0, text_guidance_proj_dim=0, appearance_guidance_dim=8,
                                  appearance_guidance_proj_dim=8, decoder_dims=(32, 16, 16),
                                  decoder_guidance_dims=channels, decoder_corr_guidance_dims=(3, 8, 8),
                                  decoder_guidance_proj_dims=(8, 8, 4), num_layers=2, nheads=4, hidden_dim=32,
                                  pooling_size=(2, 2), feature_resolution=(6, 6), window_size=6, prompt_channel=3,
                                  cnext_type='V1', kernel_size=[9, 9, 9], fast_inference=reject > 0,
                                  topK=reject).eval()
    aggregator.load_state_dict(seg.head.state_dict())
    names = 12
    text = F.normalize(torch.randn(names, 3, clip.embed_dim, generator=torch.Generator().manual_seed(2)), dim=-1)
    def tower(images, dense):
        "Their `encode_image`: features of the stages and an embedding of each cell by the head of the tower."
        trunk,out = clip.visual.trunk,{}
        x = trunk.stem(images)
        for i in range(4): x = out[f'res{i+2}'] = trunk.stages[i](x)
        x = trunk.norm_pre(x)
        cells = x.flatten(2).mT.flatten(0, 1)[..., None, None]
        out['clip_vis_dense'] = clip.visual.head(trunk.head(cells)).unflatten(0, (len(x), -1)).mT.unflatten(
            2, x.shape[-2:])
        return out
    def head(cells, guides):
        return aggregator(cells, text[None].repeat(len(cells), 1, 1, 1), [guides[name] for name in guides][::-1],
                          torch.tensor(0.))
    head.predictor = types.SimpleNamespace(clip_model=types.SimpleNamespace(encode_image=tower))
    head.ignore_value = 255
    theirs = module.SED.__new__(module.SED)
    torch.nn.Module.__init__(theirs)
    mean,std = (255*getattr(clip, name).view(3, 1, 1) for name in ('mean', 'std'))
    vars(theirs).update(sem_seg_head=head, size_divisibility=-1, sliding_window=False, clip_resolution=(192, 192),
                        clip_pixel_mean=mean, clip_pixel_std=std, pixel_mean=mean, pixel_std=std,
                        in_features=['res2', 'res3', 'res4', 'res5'], fast_inference=reject > 0,
                        clip_finetune='full')
    theirs.eval()
    image = torch.rand(3, 160, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs([dict(image=image*255, height=160, width=224)])[0]['sem_seg']
        found = seg(image[None], text)[0]
        close(found,
              F.interpolate(head_maps(theirs, image)[None], size=(160, 224), mode='bilinear',
                            align_corners=False)[0], 1e-4)
        assert wanted.shape == found.shape
    if reject: assert seg.left[0][-1] < names
    else:
        labels = torch.randint(names, (1, 160, 224), generator=torch.Generator().manual_seed(4))
        labels[:, :9] = 255
        theirs.train()
        aggregator.train()
        seg.train()
        seg.text = lambda: text
        losses = theirs([dict(image=image*255, sem_seg=labels[0])])
        mine = seg.loss(dict(images=image[None], labels=labels))
        for number in range(4):
            torch.testing.assert_close(mine[f'bce_{number}'], losses[f'loss_sem_seg_{number}'], rtol=1e-4, atol=0)

def head_maps(theirs, image):
    "The public model's map, before it is cut at the size of the image, which is smaller than the map here."
    x = (image*255-theirs.clip_pixel_mean)/theirs.clip_pixel_std
    out = theirs.sem_seg_head.predictor.clip_model.encode_image(
        F.interpolate(x[None], size=theirs.clip_resolution, mode='bilinear', align_corners=False), True)
    maps = theirs.sem_seg_head(out['clip_vis_dense'], {name: out[name] for name in theirs.in_features})[0][0]
    return maps if theirs.fast_inference else maps.sigmoid()

def test_average_precision_is_cocos():
    """Random boxes with crowds, ties, classes that are never there and images without any: `pycocotools` to 1e-6,
    class by class."""
    coco_module = pytest.importorskip('pycocotools.coco', reason='pycocotools is a requirement of development')
    import contextlib, io
    import numpy as np
    from pycocotools.cocoeval import COCOeval
    from opentrans.data.metrics import DetectionAP
    draw = np.random.default_rng(0)
    ap = DetectionAP(5)
    truth = []
    found = []
    count = 0
    for image in range(60):
        many = draw.integers(0, 7) if image else 0
        corner,size = draw.uniform(0, 60, (many, 2)),draw.uniform(4, 40, (many, 2))
        boxes = np.concatenate([corner, corner+size], 1)
        labels = draw.integers(0, 4, many)
        crowd = draw.random(many) < .15
        again = np.repeat(boxes, 2, 0) + draw.normal(0, 4, (2*many, 4))
        again[:, 2:] = np.maximum(again[:, 2:], again[:, :2]+1)
        stray = draw.uniform(0, 60, (2, 2))
        again = np.concatenate([again, np.concatenate([stray, stray+20], 1)])
        kinds = np.concatenate(
            [np.where(draw.random(2*many) < .8, np.repeat(labels, 2), draw.integers(0, 5, 2*many)),
             draw.integers(0, 5, 2)])
        scores = draw.random(len(again)).round(1)                       # many ties
        ap.update(dict(boxes=torch.tensor(again), scores=torch.tensor(scores), labels=torch.tensor(kinds)),
                  dict(boxes=boxes, labels=labels, crowd=crowd))
        for b,k,c in zip(boxes, labels, crowd):
            count += 1
            truth.append(dict(id=count, image_id=image+1, category_id=int(k)+1,
                              bbox=[b[0], b[1], b[2]-b[0], b[3]-b[1]], area=float((b[2]-b[0])*(b[3]-b[1])),
                              iscrowd=int(c)))
        found += [dict(image_id=image+1, category_id=int(k)+1, bbox=[b[0], b[1], b[2]-b[0], b[3]-b[1]],
                       score=float(s)) for b,k,s in zip(again, kinds, scores)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = dict(images=[dict(id=i+1) for i in range(60)], annotations=truth,
                            categories=[dict(id=k+1) for k in range(5)], info={})
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found), 'bbox')
        run.evaluate()
        run.accumulate()
        run.summarize()
    mine = ap.compute(groups=dict(base=[0, 1], novel=[2, 3]))
    for name,number in dict(ap=0, ap50=1, ap75=2).items(): assert abs(mine[name]-run.stats[number]) < 1e-6
    theirs = run.eval['precision'][:, :, :, 0, 2].mean((0, 1))
    for k in range(5):
        if ap.objects[k]: assert abs(mine['by_class'][k]-theirs[k]) < 1e-6
        else: assert math.isnan(mine['by_class'][k]) and theirs[k] == -1
    assert abs(mine['groups']['novel']-theirs[2:4].mean()) < 1e-6 and .05 < mine['ap'] < .95

def test_synonyms_are_one_class_where_they_are_named():
    "A model that says another word of a list is right there, and the plain mean stays what it was."
    from opentrans.data import ShapesWorld
    from opentrans.frameworks.contract import tiny_backbone
    from opentrans.training import evaluate
    world = ShapesWorld('val', n=3, size=48)
    seg = build('fpn', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
    names = list(world.vocabulary.names)
    plain,grouped = evaluate(seg, world),evaluate(seg, world, same=[names[:3], names[3:9]])
    assert plain['miou'] == grouped['miou'] and 'miou_same' not in plain
    everything = evaluate(seg, world, same=[names])
    assert everything['miou_same'] == 1                                 # one class: nothing can be wrong
    with pytest.raises(OpenTransError, match='name in `same`'): evaluate(seg, world, same=[['sofa', 'couch']])

FRAMEWORKS = ('catseg', 'deeplabv3', 'detector', 'faseg', 'fcclip', 'fpn', 'mask2former', 'sed', 'training_free')

def test_there_are_nine_frameworks():
    from opentrans.frameworks import list_frameworks
    assert {*FRAMEWORKS} <= {*list_frameworks()}

@pytest.fixture(scope='module')
def one_mask(tmp_path_factory):
    "One mask of CLIP, from magnitudes, in a file."
    from opentrans.frameworks.contract import tiny_backbone
    from opentrans.pruning import SparseMask
    path = tmp_path_factory.mktemp('mask')/'mask.safetensors'
    clip = tiny_backbone()
    SparseMask.magnitude(clip.tower, .2).save(path)
    return clip,path

@pytest.mark.parametrize('name', FRAMEWORKS)
def test_one_mask_goes_into_all_frameworks(name, one_mask):
    """Of one file: every layer finds its place, the densities are those of the mask layer by layer, and nothing is
    left over."""
    from opentrans.core import param_shapes
    from opentrans.naming import match_names
    from opentrans.pruning import SparseMask
    clip,path = one_mask
    mask = SparseMask.load(path)
    seg = build(name, clip.fresh_copy(), vocabulary=['red star', 'grass'], preset='small', seed=0)
    assert len(match_names(param_shapes(clip.tower), param_shapes(seg),
                           'weights of the tower')) == len(param_shapes(clip.tower))
    with mask.apply(seg.backbone):
        weights = mask.weights(seg)
        assert list(weights) == mask.names
        for layer,weight in weights.items():
            kept = int(mask[layer].sum())
            assert int(weight.count_nonzero()) == kept and not weight[~mask[layer]].any()
        total = sum(w.numel() for w in weights.values())
        assert abs(sum(int(w.count_nonzero()) for w in weights.values())/total - .2) < 1e-3

def test_a_vit_embeds_an_image_without_regions():
    "Among others: torch's attention takes no empty batch under a mask."
    clip = ClipBackbone.create('shapes-vit', pretrained=None)
    images,region = torch.rand(2, 3, 64, 64),torch.ones(1, 64, 64, dtype=torch.bool)
    alone = clip.region_embeddings(images[1:], [region])
    assert torch.allclose(clip.region_embeddings(images, [region[:0], region]), alone, atol=1e-6)
    assert clip.region_embeddings(images, [region[:0], region[:0]]).shape == (0, clip.embed_dim)

def test_the_stored_support_table_is_of_today():
    "A row for each framework and tower, columns as they are tried; and two cells tried once more."
    from opentrans.frameworks import list_frameworks
    from opentrans.frameworks.support import support_table, SUPPORT_TOWERS, TRIES, try_support
    table = support_table()
    assert ({*table.index} == {(name, tower) for name in FRAMEWORKS for tower in SUPPORT_TOWERS}
            and list(table) == list(TRIES))
    assert {*FRAMEWORKS} <= {*list_frameworks()}
    for cell in (('fpn', 'ResNet'), ('sed', 'ViT')):
        assert try_support(*cell, ['mask'])['mask'] == table.loc[cell, 'mask']

@pytest.mark.slow
@pytest.mark.parametrize('name', FRAMEWORKS)
def test_each_cell_of_the_support_table_is_what_happens(name):
    from opentrans.frameworks.support import support_table, SUPPORT_TOWERS, try_support
    table = support_table()
    for tower in SUPPORT_TOWERS:
        stored = {column: said for column,said in table.loc[name, tower].items() if said != 'not tried'}
        assert try_support(name, tower, list(stored)) == stored

def test_the_command_shows_what_works_and_takes_a_method(tmp_path):
    "`opentrans models`, and `segment --method` with its own backbone; what cannot be is one sentence."
    import json
    from torchvision.utils import save_image
    from test_cli import opentrans as run
    save_image(torch.rand(3, 48, 64), tmp_path/'photo.png')
    r = run('segment', tmp_path/'photo.png', 'grass, sand | water', '--method', 'naclip', '--out',
            tmp_path/'seen.png', '--json')
    assert (r.returncode == 0 and abs(sum(json.loads(r.stdout).values())-1) < 1e-6
            and (tmp_path/'seen.png').exists()), r.stderr
    r = run('segment', tmp_path/'photo.png', 'grass', '--method', 'naclop', '--out', tmp_path/'seen.png')
    assert r.returncode == 2 and "Did you mean 'naclip'?" in r.stderr and 'Traceback' not in r.stderr
    r = run('models', '--json')
    assert r.returncode == 0 and len(json.loads(r.stdout)) == 3*len(FRAMEWORKS), r.stderr

def numel(m): return sum(p.numel() for p in m.parameters())

def test_heads_of_full_size_are_those_of_the_public_code(load):
    """Parameters, names and shapes of CAT-Seg's head for ViT-B/16 and of SED's for ConvNeXt-B, as their
    configurations build them."""
    pytest.importorskip('einops', reason='the public code needs einops')
    from opentrans.frameworks.catseg import Aggregator
    from opentrans.frameworks.sed import FusionDecoder
    model = load(public('CAT-Seg', 'cat_seg', 'modeling', 'transformer', 'model.py'), 'catseg_transformer')
    theirs = model.Aggregator(text_guidance_dim=512, appearance_guidance_dim=512, num_layers=2, pooling_size=(2, 2))
    for name in ('convnext', 'model'):
        module = load(public('SED', 'sed', 'modeling', 'transformer', f'{name}.py'), name, package='sed_public')
    other = module.Aggregator(text_guidance_dim=0, text_guidance_proj_dim=0, decoder_dims=(64, 32, 16),
                              decoder_guidance_dims=(512, 256, 128), decoder_guidance_proj_dims=(32, 16, 8),
                              num_layers=2, pooling_size=(2, 2), prompt_channel=80, kernel_size=[9, 9, 9])
    for mine,their in ((Aggregator(512, (256, 128)), theirs), (FusionDecoder((512, 256, 128)), other)):
        shapes = {n: tuple(t.shape) for n,t in their.state_dict().items() if not n.endswith('attn_mask')}
        assert {n: tuple(t.shape) for n,t in mine.state_dict().items()} == shapes and numel(mine) == numel(their)
    assert (numel(theirs), numel(other)) == (2_308_961, 1_376_396)

def test_masks_are_judged_apart_from_their_names():
    "`kind='masks'`: what the metric says of the same labels, one picture at a time."
    from opentrans.data import MaskNames, ShapesWorld, collate
    from opentrans.training import evaluate
    clip,world = ClipBackbone.create('shapes-rn', pretrained='shapes-rn'),ShapesWorld('val', n=3)
    seg = build('deeplabv3', clip, vocabulary=world.vocabulary)
    names = list(world.vocabulary.names)
    same = [names[:3], names[3:9]]
    got = evaluate(seg, world, kind='masks', same=same)
    metric = MaskNames(len(names), world.ignore)
    text = seg.text(world.vocabulary)
    with torch.no_grad():
        for i in range(3):
            batch = collate([world[i]])
            metric.update(seg.eval().semantic(batch['images'], text), batch['labels'])
    wanted = metric.compute([[names.index(name) for name in of] for of in same])
    assert {key: got[key] for key in ('found', 'named', 'precision')} == pytest.approx(
        {key: wanted[key] for key in ('found', 'named', 'precision')}, nan_ok=True)
    assert got['miou'] == pytest.approx(evaluate(seg, world)['miou']) and 'miou_same' in got

def test_names_that_mean_the_same_from_the_command():
    import json
    from opentrans.data import ShapesWorld
    from test_alpha_anywhere import command
    names = list(ShapesWorld('val', n=1).vocabulary.names)
    plain = ('evaluate', '--limit', '2', '--json')
    code,out,err = command(*plain, '--same', f'{names[0]}|{names[1]}', '--kind', 'masks')
    told = json.loads(out)
    assert code == 0 and 0 <= told['miou_same'] <= 1 and 0 <= told['found'] <= 1, err
    assert 'miou_same' not in json.loads(command(*plain)[1])
    for bad,said in ((names[0], 'holds one name'), (f'{names[0]}|zeppelin', 'zeppelin')):
        code,_,err = command(*plain, '--same', bad)
        assert code == 2 and said in err and 'Traceback' not in err
