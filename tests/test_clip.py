"CLIP backbones at full size, weights from files and downloads, and what is said when they are missing."
import copy, json, math, warnings
from types import SimpleNamespace
import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F
from opentrans.clip import (ASSETS, ClipBackbone, compact_tokens, load_weights, open_model, save_weights,
                            small_clip, small_clips)
from opentrans.clip.backbone import Origin, TextEncoder
from opentrans.errors import OpenTransError
from opentrans.core import layers
from opentrans.files import load_metadata, save_tensors
from opentrans.data import (COLOURS, DOMAINS, SHAPES, TEXTURES, TRIPLES, ShapesWorld, Vocabulary, is_novel,
                            object_image)

VISION = dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64)
CONFIG = dict(embed_dim=32, vision_cfg=VISION, text_cfg=dict(context_length=12, width=32, heads=2, layers=1),
              tokens=compact_tokens(['a photo of a red star.', 'a ring']))

@pytest.fixture(scope='module')
def rn50():
    return ClipBackbone.create('RN50', seed=0)

@pytest.fixture
def tiny():
    model,tok = small_clip(CONFIG, seed=0)
    return ClipBackbone.from_model(model, tok, 'tiny')

@torch.no_grad()
def test_rn50_is_open_clips_at_native_size(rn50):
    x = torch.rand(1, 3, 224, 224)
    assert torch.allclose(rn50.encode_image(x), F.normalize(rn50.visual(rn50.prepare(x)), dim=-1),
                          atol=1e-5), 'pooling differs from the tower itself'
    assert (rn50.channels == dict(res2=256, res3=512, res4=1024, res5=2048)
            and rn50.strides == dict(res2=4, res3=8, res4=16, res5=32))
    trunk = sum(p.numel() for n,p in rn50.visual.named_parameters() if not n.startswith('attnpool'))
    assert trunk == 23_527_264 and len([layer for layer in layers(rn50) if layer.kind == 'conv']) == 55

@torch.no_grad()
def test_rn50_other_sizes_and_regions(rn50):
    x,m = torch.rand(1, 3, 100, 161),torch.zeros(2, 100, 161, dtype=torch.bool)
    # everything; the last pixel, which no stride reaches
    m[0], m[1,99,160] = True, True
    assert rn50(x)['res5'].shape[1] == 2048
    e = rn50.region_embeddings(x, [m])
    assert torch.allclose(e[0], rn50.encode_image(x)[0], atol=1e-5) and e.isfinite().all()
    assert torch.allclose(e.norm(dim=1), torch.ones(2), atol=1e-5)

@pytest.mark.parametrize('size', [(64, 64), (96, 128), (65, 79), (33, 47)])
@torch.no_grad()
def test_any_image_size(tiny, size):
    x = torch.rand(2, 3, *size)
    for k,f in tiny(x).items():
        assert abs(f.shape[-1] - size[1]/tiny.strides[k]) < 1.01, f'{k} has a width of {f.shape[-1]} for {size[1]}'
    assert tiny.dense_embeddings(x).shape[:2] == (2, 32) and tiny.encode_image(x).shape == (2, 32)

@pytest.mark.parametrize('image_size, patch_size', [(84, 14), (80, 16), (64, 16)])
def test_strides_are_those_of_the_tower_at_any_native_size(image_size, patch_size):
    "Also where its images are no multiple of 32 pixels wide, as those of ViT-L-14-336: a cell is cut there."
    sizes = dict(image_size=image_size, patch_size=patch_size, width=32, layers=4, heads=2, mlp_ratio=2, output_dim=16)
    visual = open_clip.transformer.VisionTransformer(**sizes)
    _,strides,_ = Origin('tiny', None, visual, None, (0., 0., 0.), (1., 1., 1.), 1.).maps
    assert strides == dict(res2=4, res3=8, res4=16, res5=32)

@torch.no_grad()
@pytest.mark.parametrize('name', small_clips())
def test_images_without_a_cell_are_refused_in_a_sentence(name):
    "A ViT fills up its last patch; from the others' maps nothing is left."
    clip = ClipBackbone.create(name)
    small = torch.rand(1, 3, 40, 20)
    asked = (clip, clip.encode_image, clip.dense_embeddings, clip.region_embeddings)
    if name == 'shapes-vit':
        for ask in asked: ask(small)
        return
    for ask in asked:
        with pytest.raises(OpenTransError, match='20 x 40 pixels.*at least 32 pixels'): ask(small)

@torch.no_grad()
@pytest.mark.parametrize('name', small_clips())
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_regions_are_embedded_in_any_floating_type(name, dtype):
    clip = ClipBackbone.create(name, pretrained=name)
    images = torch.rand(1, 3, 64, 80)
    regions = [torch.zeros(2, 64, 80, dtype=torch.bool)]
    regions[0][0,:40,:20] = regions[0][1,30:] = True
    wanted = clip.region_embeddings(images, regions)
    other = clip.fresh_copy().to(dtype)
    got = other.region_embeddings(images.to(dtype), regions)
    assert got.dtype == dtype and F.cosine_similarity(got.float(), wanted).min() > .999
    cells = other.dense_embeddings(images.to(dtype)).float()
    assert F.cosine_similarity(cells, clip.dense_embeddings(images)).min() > .99

@torch.no_grad()
@pytest.mark.parametrize('name', small_clips())
def test_no_image_gives_no_embedding(name):
    clip = ClipBackbone.create(name)
    none = torch.rand(0, 3, 64, 64)
    assert clip.encode_image(none).shape == (0, 64)
    for mode in ('attention', 'crop', 'tight'): assert clip.region_embeddings(none, [], mode).shape == (0, 64)

def test_what_are_no_regions_is_said(tiny):
    for images,regions,why in ((torch.rand(3, 64, 64), None, 'must be a float tensor'),
                               (torch.rand(1, 3, 64, 64), [np.ones((1, 64, 64))], 'image 0 are a ndarray')):
        with pytest.raises(OpenTransError, match=why): tiny.region_embeddings(images, regions)

def test_gradients_reach_the_tower_and_only_it(tiny):
    x,m = torch.rand(2, 3, 64, 64),torch.zeros(2, 64, 64, dtype=torch.bool)
    m[0,:40], m[1,30:,30:] = True, True
    for mode in ('attention', 'crop'):
        tiny.zero_grad()
        (tiny.region_embeddings(x, [m, m[:1]],
                                mode) @ tiny.encode_text(['red star', 'red ring']).T).sum().backward()
        silent = [n for n,p in tiny.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not [n
                    for n in silent
                    if 'bn3' not in n and 'layer' not in n.split('.')[1]], f'no gradient ({mode}): {silent}'
    assert all(p.grad is None and not p.requires_grad for p in tiny.text.model.parameters())

def test_regions_do_not_see_each_other(tiny):
    "An embedding depends on its own region, not on which others are asked for, nor on the batch."
    x,m = torch.rand(3, 3, 64, 96),torch.rand(5, 64, 96) > .5
    for mode in ('attention', 'crop'):
        with torch.no_grad():
            all_ = tiny.region_embeddings(x, [m, m[:2], m[2:]], mode)
            one = tiny.region_embeddings(x[:1], [m[3:4]], mode)
        assert torch.allclose(all_[3], one[0], atol=1e-5), mode

def test_state_dict_is_the_tower(tiny):
    assert list(tiny.state_dict()) == [f'visual.{k}' for k in tiny.visual.state_dict()]
    other = tiny.fresh_copy()
    other.load_state_dict(tiny.state_dict())
    assert not any('text' in n or 'token' in n for n,_ in tiny.named_parameters())

def test_copies_share_text_and_start_from_the_original(tiny):
    start = copy.deepcopy(tiny.state_dict())
    with torch.no_grad(): [p.add_(1.) for p in tiny.parameters()]
    fresh = tiny.fresh_copy()
    assert all(torch.equal(v, start[k]) for k,v in fresh.state_dict().items()) and fresh.text is tiny.text
    with torch.no_grad(): [p.add_(1.) for p in fresh.parameters()]
    assert all(torch.equal(v, start[k])
               for k,v in tiny.fresh_copy().state_dict().items()), 'a copy wrote into the original'

def test_vocabulary_and_lists_agree(tiny):
    v = Vocabulary(['red star', 'ring,red ring'], templates=('a {}', 'a red {}'))
    assert torch.equal(tiny.encode_text(v), tiny.encode_text(['red star', 'ring,red ring'], ('a {}', 'a red {}')))
    assert not torch.allclose(tiny.encode_text(v), tiny.encode_text(v, 'a {}'))
    assert len(tiny.text.cache) == 5, 'a prompt was encoded twice'

def test_random_weights_only_when_asked_for():
    a,b,c = (ClipBackbone.create('shapes-rn', pretrained=None, seed=s).visual.layer4[0].conv1.weight
             for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    x = torch.rand(3)
    torch.manual_seed(0)
    ClipBackbone.create('shapes-rn', seed=9)
    assert torch.equal(x, torch.rand(3)), 'making a backbone moved the global generator'

@pytest.mark.parametrize('suffix', ['safetensors', 'pt', 'bin'])
def test_weights_from_files(tmp_path, suffix):
    model,tok = small_clip('shapes-rn', seed=5)
    path = tmp_path/f'w.{suffix}'
    if suffix == 'safetensors': save_weights(model, path, half=True)
    else: torch.save(model.half().state_dict(), path)
    clip = ClipBackbone.create('shapes-rn', pretrained=str(path))
    assert (torch.equal(clip.visual.conv1.weight, model.visual.conv1.weight.half().float())
            and clip.visual.conv1.weight.dtype == torch.float32)
    cut = tmp_path/f'cut.{suffix}'
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OpenTransError, match='not a whole safetensors file|cannot be read as plain weights'):
        ClipBackbone.create('shapes-rn', pretrained=cut)

def test_openai_names(tmp_path):
    "OpenAI's state dicts (with three numbers among the tensors) load, and bring their activation with them."
    model = open_clip.CLIP(16, dict(VISION), dict(context_length=8, vocab_size=40, width=16, heads=2, layers=1))
    sd = ({k: v.half() for k,v in model.state_dict().items()}
          | {k: torch.tensor(8) for k in ('input_resolution', 'context_length', 'vocab_size')})
    other = copy.deepcopy(model)
    with torch.no_grad(): [p.zero_() for p in other.parameters()]
    load_weights(other, sd)
    assert torch.equal(other.visual.conv1.weight, model.visual.conv1.weight.half().float())

TINY = dict(embed_dim=32, vision_cfg=VISION,
            text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))

@pytest.fixture
def tiny_architectures(monkeypatch):
    "open_clip's names stand for towers of a few thousand weights; what is published under them stays as it is."
    def config(name): return copy.deepcopy(dict(TINY, quick_gelu=True) if name.endswith('-quickgelu') else TINY)
    monkeypatch.setattr(open_clip, 'get_model_config', config)

def activation(model): return type(model.transformer.resblocks[0].mlp.gelu).__name__

def opened(*args, **kwargs):
    "An open_clip model, and what was warned of."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model,tokenizer,mean,std = open_model(*args, **kwargs)
    return model,tokenizer,mean,std,[str(w.message) for w in said]

def test_openai_file_means_quick_gelu(tmp_path, tiny_architectures):
    "OpenAI's own files hold their resolution among the weights; another file does not tell, and that is said once."
    state = open_model('RN50')[0].state_dict()
    for extra,kind,words in (({}, 'GELU', 1), ({'input_resolution': torch.tensor(64)}, 'QuickGELU', 0)):
        torch.save({**state, **extra}, tmp_path/'w.pt')
        model,*_,said = opened('RN50', str(tmp_path/'w.pt'))
        assert activation(model) == kind and len(said) == words, said
    torch.save(state, tmp_path/'w.pt')
    (said,) = opened('RN50', tmp_path/'w.pt')[-1]
    assert 'which activation' in said and "'RN50-quickgelu'" in said and 'normalised' not in said, (
        'all published weights of RN50 are normalised alike')
    assert not opened('RN50', tmp_path/'w.pt', quick_gelu=False)[-1], 'what the user says needs no warning'

@pytest.mark.parametrize('name', ['RN50', 'RN50-quickgelu'])
def test_an_activation_that_is_asked_for_is_taken(name, tiny_architectures):
    for quick,kind in ((True, 'QuickGELU'), (False, 'GELU'), (None, 'QuickGELU' if 'quick' in name else 'GELU')):
        assert activation(open_model(name, quick_gelu=quick)[0]) == kind, (name, quick)

MEAN,STD = (.5, .25, .125),(.25, .5, .75)

@pytest.mark.parametrize('half', [False, True])
def test_a_file_tells_activation_and_normalisation(tmp_path, tiny_architectures, half):
    "What the weights were trained with comes back with them, over the name, and over both comes the user."
    model,*_ = open_model('RN50', quick_gelu=True, mean=MEAN, std=STD)
    save_weights(model, tmp_path/'w.safetensors', half=half, steps=3)
    assert load_metadata(tmp_path/'w.safetensors')['steps'] == '3'
    for name in ('RN50', 'RN50-quickgelu', 'RN101'):
        again,_,mean,std,said = opened(name, tmp_path/'w.safetensors')
        assert (activation(again), mean, std, said) == ('QuickGELU', MEAN, STD, []), name
    again,_,mean,std,said = opened('RN50', tmp_path/'w.safetensors', quick_gelu=False, mean=(0, 0, 0),
                                   std=(1, 1, 1))
    assert (activation(again), mean, std, said) == ('GELU', (0, 0, 0), (1, 1, 1), [])

def test_a_backbone_keeps_activation_and_normalisation(tmp_path, tiny_architectures):
    "Through a copy, a file, and a file of the copy."
    clip = ClipBackbone.create('RN50', quick_gelu=True, mean=MEAN, std=STD)
    for number in range(2):
        save_weights(clip, tmp_path/f'{number}.safetensors')
        clip = ClipBackbone.create('RN50', tmp_path/f'{number}.safetensors').fresh_copy()
        assert (activation(clip.text.model) == 'QuickGELU' and clip.mean.flatten().tolist() == list(MEAN)
                and clip.std.flatten().tolist() == list(STD))
        assert (clip.origin.mean, clip.origin.std) == (MEAN, STD)
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(clip.prepare(x), (x-clip.mean)/clip.std)

def test_sizes_come_back_with_the_weights(tmp_path, monkeypatch):
    "A tower of another size, or a longer text, is opened in the size that it was trained in."
    other = copy.deepcopy(TINY)
    other['vision_cfg'] = dict(layers=4, width=32, head_width=16, patch_size=8, image_size=96)
    other['text_cfg']['context_length'] = 12
    usual = copy.deepcopy(other)
    usual['vision_cfg']['image_size'] = 64
    usual['text_cfg']['context_length'] = 8
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: copy.deepcopy(other))
    model = open_model('ViT-B-32')[0]
    save_weights(model, tmp_path/'w.safetensors')
    torch.save(model.state_dict(), tmp_path/'w.pt')
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: copy.deepcopy(usual))
    again,tokenizer,_,_,said = opened('ViT-B-32', tmp_path/'w.safetensors')
    assert (not said and tokenizer(['a']).shape == (1, 12)
            and ClipBackbone.from_model(again, tokenizer).image_size == 96)
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(OpenTransError, match='have other shapes for 1 of .*positional_embedding'):
        opened('ViT-B-32', tmp_path/'w.pt') # the text's
    usual['text_cfg']['context_length'] = 12
    assert any('were resampled' in words for words in opened('ViT-B-32', tmp_path/'w.pt')[-1])

def test_normalisation_that_all_published_weights_share_is_taken(tmp_path, tiny_architectures):
    "MobileCLIP and SigLIP have colours of their own; of ViT-L-14 there are two kinds, and that is said."
    torch.save(open_model('RN50')[0].state_dict(), tmp_path/'w.pt')
    for name,mean in (('MobileCLIP-S1', (0., 0., 0.)), ('PE-Core-B-16', (.5, .5, .5))):
        assert opened(name, tmp_path/'w.pt')[2] == mean, name
    _,_,mean,_,(said,) = opened('ViT-L-14', tmp_path/'w.pt', quick_gelu=False)
    assert (mean == tuple(open_clip.OPENAI_DATASET_MEAN) and 'how their images were normalised' in said
            and 'activation' not in said)

@pytest.mark.parametrize('facts',
                         [dict(mean=[0, 0]), dict(std=[1, 0, 1]), dict(mean='grey'), dict(quick_gelu=1),
                          dict(image_size=10**9), dict(run='code'), [], 7])
def test_facts_that_are_none(tmp_path, facts):
    "What a file tells is checked like everything that is read."
    model,_ = small_clip('shapes-rn', seed=5)
    save_tensors(model.state_dict(), tmp_path/'w.safetensors', dict(clip=facts))
    with pytest.raises(OpenTransError, match="damaged|three numbers"):
        ClipBackbone.create('shapes-rn', tmp_path/'w.safetensors')

def test_files_of_older_versions_and_of_others_are_read(tmp_path):
    "Weights without facts, as 0.1 and other programs write them, are those of a small CLIP without a word."
    model,_ = small_clip('shapes-rn', seed=5)
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k,v in model.state_dict().items()}, str(tmp_path/'w.safetensors'),
              metadata=dict(steps='3'))
    again,*_,said = opened('shapes-rn', tmp_path/'w.safetensors')
    assert not said and torch.equal(again.visual.conv1.weight, model.visual.conv1.weight)

def test_weights_that_are_not_numbers_are_refused(tmp_path):
    model,_ = small_clip('shapes-rn', seed=5)
    with torch.no_grad(): model.visual.conv1.weight[0] = math.nan
    save_weights(model, tmp_path/'w.safetensors')
    with pytest.raises(OpenTransError, match='not finite'):
        ClipBackbone.create('shapes-rn', tmp_path/'w.safetensors')

def test_a_tag_that_was_downloaded_needs_no_network(tmp_path, tiny_architectures, monkeypatch):
    "With hub=False the copy on this machine is taken as it is, and without one it is said; nothing is asked."
    def asked(*args, **kwargs): raise AssertionError('the network was asked')
    monkeypatch.setattr(open_clip, 'download_pretrained', asked)
    monkeypatch.setattr('opentrans.clip.weights._reach', asked)
    model,*_ = open_model('RN50', quick_gelu=True)
    place = tmp_path/'models--timm--resnet50_clip.openai'
    with pytest.raises(OpenTransError, match="not on this machine, and it is a file that asks for them"):
        open_model('RN50', 'openai', cache_dir=tmp_path, hub=False)
    (place/'refs').mkdir(parents=True)
    (place/'refs'/'main').write_text('a'*40)
    save_weights(model, place/'snapshots'/('a'*40)/'open_clip_model.safetensors')
    again,_,mean,_,said = opened('RN50', 'openai', cache_dir=tmp_path, hub=False)
    assert (torch.equal(again.visual.conv1.weight, model.visual.conv1.weight) and activation(again) == 'QuickGELU'
            and not said)

def test_published_weights_are_fetched_and_checked(tmp_path, monkeypatch):
    "A tag leads to a download; what comes must fill the whole model; a failure says what to do."
    config = dict(embed_dim=32, vision_cfg=dict(VISION),
                  text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))
    monkeypatch.setattr(open_clip, 'get_model_config',
                        lambda name: copy.deepcopy(config) if name == 'RN50' else None)
    monkeypatch.setattr(open_clip, 'get_tokenizer', lambda name: open_clip.SimpleTokenizer(context_length=8))
    monkeypatch.setattr('opentrans.clip.weights._reach', lambda cfg: None)
    model = open_clip.CLIP(**copy.deepcopy(config), quick_gelu=True)
    save_weights(model, tmp_path/'good.safetensors')
    monkeypatch.setattr(open_clip, 'download_pretrained',
                        lambda cfg, cache_dir=None: str(tmp_path/'good.safetensors'))
    clip = ClipBackbone.create('RN50', pretrained='openai')
    assert torch.equal(clip.visual.conv1.weight, model.visual.conv1.weight) and clip.origin.pretrained == 'openai'
    assert activation(clip.text.model) == 'QuickGELU', "OpenAI's weights need OpenAI's activation"
    def fails(cfg, cache_dir=None): raise OSError('no route')
    monkeypatch.setattr(open_clip, 'download_pretrained', fails)
    with pytest.raises(OpenTransError,
                       match='could not be downloaded .*Check the network, or fetch .* and give the path'):
        ClipBackbone.create('RN50', pretrained='openai')
    with pytest.raises(OpenTransError, match='Unknown weights .*openai'):
        ClipBackbone.create('RN50', pretrained='no-such-tag')

@torch.no_grad()
def test_shipped_clip():
    """The small CLIP that ships: it is small, and knows the names of its world, also those that no caption ever
    held."""
    path = ASSETS/'shapes-rn.safetensors'
    if not path.exists():
        pytest.fail(
            'opentrans/assets/shapes-rn.safetensors is not there: train it with '
            'nbs/tutorials/train_shapes_clip.ipynb')
    assert path.stat().st_size <= 8*2**20
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    def name(k): return f'{list(COLOURS)[k[0]]} {TEXTURES[k[1]]} {list(SHAPES)[k[2]]}'
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                 # each of these words is known
        text,rng = clip.encode_text([name(k) for k in TRIPLES]),np.random.default_rng(0)
        for domain in DOMAINS: clip.encode_text(ShapesWorld('val', domain, n=1).vocabulary)
    right = {False: [], True: []}
    for i,k in enumerate(TRIPLES*3):
        x = torch.from_numpy(object_image(rng, 64, *k)).permute(2, 0, 1)[None]/255
        right[is_novel(*k)].append(int((clip.encode_image(x) @ text.T).argmax()) == i % len(TRIPLES))
    assert np.mean(right[False]) > .8 and np.mean(
        right[True]) > .4, f'base {np.mean(right[False])}, novel {np.mean(right[True])}; chance {1/len(TRIPLES)}'
    with pytest.warns(UserWarning, match='zebra'): clip.encode_text(['zebra'])

@pytest.mark.parametrize('name', small_clips())
def test_a_shipped_clip_knows_what_its_file_says(name):
    "Zero-shot on other pictures than it was measured on, within what 240 pictures can tell."
    from opentrans.experiments import zero_shot
    told,n = json.loads(load_metadata(ASSETS/f'{name}.safetensors')['zero_shot']),240
    found = zero_shot(ClipBackbone.create(name, pretrained=name), n, seed=2)
    for k in ('base', 'novel'):
        assert (abs(found[k]-told[k]) < 4*math.sqrt(max(told[k]*(1-told[k]), .01)/n) and told[k] > .5), (
            k, found, told)

def test_a_tower_alone_is_laid_over_a_clip(tmp_path):
    "What `prune --weights` writes is read: with a small CLIP's own text encoder, and with another's that is named."
    from opentrans.files import save_tensors
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    text = clip.encode_text(['red star', 'grass'])
    with torch.no_grad():
        for weight in clip.visual.parameters(): weight.mul_(1.5)
    save_tensors(clip.visual.state_dict(), tmp_path/'tower.safetensors')
    for pretrained in (tmp_path/'tower.safetensors', f"shapes-rn,{tmp_path/'tower.safetensors'}"):
        again = ClipBackbone.create('shapes-rn', pretrained=str(pretrained))
        assert all(torch.equal(weight, again.visual.state_dict()[name])
                   for name,weight in clip.visual.state_dict().items())
        assert torch.equal(again.encode_text(['red star', 'grass']), text) and torch.equal(again.mean, clip.mean)
    with pytest.raises(OpenTransError, match='Say whose text encoder'):
        ClipBackbone.create('RN50', pretrained=str(tmp_path/'tower.safetensors'))
    with pytest.raises(OpenTransError, match='weights of the image tower'):
        ClipBackbone.create('RN50', pretrained=f"none,{tmp_path/'tower.safetensors'}")
    with pytest.raises(OpenTransError, match='no file of an image tower'):
        ClipBackbone.create('shapes-rn', pretrained='shapes-rn,none.safetensors')

def embedded_whole(clip, texts):
    "As open_clip does it: all 77 tokens of each text."
    with torch.no_grad(): return F.normalize(clip.text.model.encode_text(clip.text.tokenizer(texts)), dim=-1)

def test_a_text_is_read_to_its_end_and_no_further(rn50, monkeypatch):
    texts = ['cat', 'a photo of a traffic light.', ' '.join(['tree']*90)]
    seen = []
    real = type(rn50.text.model).encode_text
    monkeypatch.setattr(type(rn50.text.model), 'encode_text',
                        lambda self, tokens: seen.append(tokens.shape[1]) or real(self, tokens))
    short = rn50.text.prompts(texts[:2])
    assert seen == [9] # two marks, six words and a full stop
    longest = rn50.text.prompts(texts[2:])
    assert seen == [9, 77]
    monkeypatch.undo()
    assert torch.allclose(torch.cat([short, longest]), embedded_whole(rn50, texts), atol=1e-6)

@pytest.mark.parametrize('change', ['sees ahead', 'answers elsewhere'])
def test_a_text_side_that_is_not_causal_reads_all(rn50, change):
    encoder = TextEncoder(rn50.text.model, rn50.text.tokenizer)
    if change == 'sees ahead': encoder.model._buffers = dict(attn_mask=torch.zeros(77, 77))
    else: encoder.model.text_pool_type = 'last'
    clip = SimpleNamespace(text=encoder)
    assert torch.equal(encoder.prompts(['cat']), embedded_whole(clip, ['cat']))
