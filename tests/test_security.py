"""Files of a stranger run nothing and fetch nothing: a process that records what its interpreter does opens every
kind of forged file, with every command and every loader."""
import json, os, pickle, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

class Runs:
    "Makes a file when it is unpickled."
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return exec, (f"open({self.marker!r}, 'w').close()",)

def write(path, value):
    "A JSON file, or a text."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)

@pytest.fixture(scope='module')
def forged(tmp_path_factory):
    "A folder with a forged file of every kind, and the file that appears if one of them runs."
    folder = tmp_path_factory.mktemp('forged')
    marker = str(folder/'marker')
    code = (
        f"open({marker!r}, 'w').close()\nfrom transformers import PreTrainedTokenizer\nclass "
        f"Evil(PreTrainedTokenizer): pass\n")
    clip = folder/'clip'
    write(clip/'evil.py', code)
    write(clip/'tokenization_evil.py', code)
    write(clip/'__init__.py', code)
    write(clip/'tokenizer_config.json',
          dict(auto_map=dict(AutoTokenizer=['evil.Evil', None]), tokenizer_class='Evil'))
    write(clip/'config.json',
          dict(model_type='evil',
               auto_map=dict(AutoConfig='evil.Evil', AutoModel='evil.Evil', AutoTokenizer=['evil.Evil', None])))
    text = dict(hf_tokenizer_name=str(clip), hf_model_name=str(clip), tokenizer_kwargs=dict(trust_remote_code=True))
    vision = dict(timm_model_name=f'local-dir:{clip}', timm_model_pretrained=True)
    configs = dict(
        open_clip_config=dict(model_cfg=dict(embed_dim=32,
                                             vision_cfg=dict(layers=4, width=32, patch_size=8, image_size=64),
                                             text_cfg=text)),
        text=dict(embed_dim=32, vision_cfg=dict(layers=4, width=32), text_cfg=text, tokens=['a</w>']),
        vision=dict(embed_dim=32, vision_cfg=vision, text_cfg=dict(width=32, heads=2, layers=1), tokens=['a</w>']),
        timm_hub=dict(embed_dim=32, vision_cfg=dict(timm_model_name='hf-hub:evil/model'),
                      text_cfg=dict(width=32, heads=2, layers=1), tokens=['a</w>']))
    for name,config in configs.items(): write(clip/f'{name}.json', config)
    for suffix in ('pt', 'pth', 'bin', 'pkl', 'safetensors'):
        (folder/f'weights.{suffix}').write_bytes(pickle.dumps(Runs(marker)))
    write(folder/'run.yaml', f"backbone: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    return folder

NAMES = ('local-dir:{clip}', 'hf-hub:evil/model', '{clip}', '{clip}/text.json', '{clip}/vision.json', 'hf-hub:',
         'local-dir:', '../clip')

def commands(backbone, pretrained, mask, photo, out):
    "Every command that opens a backbone."
    weights = ('--pretrained', pretrained) if pretrained else ()
    both = ('--pretrained-a', pretrained, '--pretrained-b', pretrained) if pretrained else ()
    few = ('--iterations', '1', '--batch-size', '1')
    return [['alpha', backbone, *weights], ['cost', backbone, *weights],
            ['cost', backbone, *weights, '--framework', 'fcclip'], ['cka', backbone, *both],
            ['cka', 'shapes-rn', backbone, *both],
            ['prune', '--out', f'{out}/m.safetensors', '--backbone', backbone, *weights],
            ['transfer', mask, '--backbone', backbone, *weights, *few],
            ['finetune', '--out', f'{out}/run', '--backbone', backbone, *weights, *few],
            ['evaluate', '--backbone', backbone, *weights],
            ['segment', photo, 'sky', '--backbone', backbone, *weights, '--out', f'{out}/p.png']]

class Watched:
    """A recorded process. It runs commands (lists) and lines of Python (texts), and tells of each its exit code,
    what it said, and what it did."""
    def __init__(self, forged, home):
        env = {k: v
               for k,v in os.environ.items()
               if 'proxy' not in k.lower() and k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_CACHE')}
        env.update(HOME=str(home), HF_HOME=str(home/'hf'), XDG_CACHE_HOME=str(home), OMP_NUM_THREADS='1',
                   OPENTRANS_PROGRESS='0', PYTHONPATH=str(root), MPLBACKEND='agg')
        self.errors = open(home/'errors.txt', 'w+')
        words = map(str, (root/'tests'/'watched.py', forged, forged/'marker'))
        self.process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=env, cwd=home)

    def __call__(self, jobs):
        return [self.do(job) for job in jobs]

    def do(self, job):
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"told"'): return json.loads(line)
        self.errors.seek(0)
        pytest.fail(f'the recorded process ended at {job}: {self.errors.read()[-2000:]}')

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.errors.close()

@pytest.fixture(scope='module')
def watched(forged, tmp_path_factory):
    runs = Watched(forged, tmp_path_factory.mktemp('home'))
    yield runs
    runs.end()

@pytest.fixture(scope='module')
def mask(tmp_path_factory):
    from opentrans.clip import ClipBackbone
    from opentrans.pruning import SparseMask
    path = tmp_path_factory.mktemp('mask')/'m.safetensors'
    SparseMask.magnitude(ClipBackbone.create('shapes-rn', pretrained='shapes-rn'), .5).save(path)
    return str(path)

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    from PIL import Image
    path = tmp_path_factory.mktemp('photo')/'p.png'
    Image.new('RGB', (64, 64), 'green').save(path)
    return str(path)

def is_harmless(results, words=''):
    """Nothing ran, nothing was asked of the network, nothing ended in a traceback, and each was refused in one
    sentence."""
    for r in results:
        assert not r['ran'] and not r['seen'], r
        assert r['code'] == 2 and 'Traceback' not in r['said'], r
        assert words in r['said'], r

def test_the_forgeries_are_alive(watched, forged):
    """The tests below can fail: outside of opentrans these files run, and a tag that the user types is asked of the
    network."""
    jobs = [f"import open_clip\nopen_clip.get_tokenizer('local-dir:{forged/'clip'}')",
            f"import torch\ntorch.load({str(forged/'weights.pt')!r}, weights_only=False)",
            f"import yaml\nyaml.unsafe_load(open({str(forged/'run.yaml')!r}))",
            ['alpha', 'RN50', '--pretrained', 'openai']]
    alive = watched([dict(apart=job) for job in jobs])
    assert [r['ran'] for r in alive] == [True]*3 + [False], alive
    assert (any('getaddrinfo' in event or 'connect' in event for event in alive[-1]['seen'])
            and 'could not be downloaded' in alive[-1]['said']), alive[-1]

def test_a_backbones_name_runs_nothing(watched, forged, mask, photo, tmp_path):
    "By a flag, by an argument, with weights and without."
    names = [name.format(clip=forged/'clip') for name in NAMES]
    is_harmless(
        watched([c for name in names for pretrained in ('none', None)
                 for c in commands(name, pretrained, mask, photo, tmp_path) if pretrained or 'local-dir' in name]))
    assert not list(tmp_path.iterdir()), 'something was written for a run that cannot begin'

def test_a_file_of_settings_runs_nothing_and_fetches_nothing(watched, forged, mask, photo, tmp_path):
    "The same names and a tag from a file; and the file cannot allow itself the hub."
    jobs = []
    def add(name, args, **values):
        jobs.append([*args, '--config', write(tmp_path/f'{name}{len(jobs)}.json', values)])
    alone = {c[0]: c
             for c in ([c[:1] for c in commands('', '', '', '', '') if c[0] in ('alpha', 'cost')]
                       + [['cka'], ['prune', '--out', f'{tmp_path}/m.safetensors'],
                          ['transfer', mask, '--iterations', '1'],
                          ['finetune', '--out', f'{tmp_path}/run', '--iterations', '1'], ['evaluate'],
                          ['segment', photo, 'sky', '--out', f'{tmp_path}/p.png']])}
    for command,args in alone.items():
        place,weights = ('a', 'pretrained_a') if command == 'cka' else ('backbone', 'pretrained')
        for name in NAMES[:4]: add('name', args, **{place: name.format(clip=forged/'clip'), weights: 'none'})
        for tag in ('openai', 'yfcc15m'): add('tag', args, **{place: 'RN50', weights: tag})
        add('hub', args, allow_hub=True)
        add('hub', args, **{'allow-hub': 'yes'})
        add('pickle', args, **{weights: str(forged/'weights.pt')})
        jobs.append([*args, '--config', str(forged/'run.yaml')])
    for args in (['demo', '--out', f'{tmp_path}/demo'], ['study', 'ratio', '--out', f'{tmp_path}/study']):
        add('scale', args, scale='gpu')
    is_harmless(watched(jobs))
    assert {p.suffix for p in tmp_path.iterdir()} == {'.json'}, 'something was written for a run that cannot begin'

def test_the_folder_of_a_model_runs_nothing_and_fetches_nothing(watched, forged, photo, tmp_path):
    "Whatever its model.json names: backbone, weights, framework, preset; and whatever its weights are."
    told = dict(framework='deeplabv3', backbone='shapes-rn', pretrained=None, preset=None, output_stride=16)
    clip,jobs = forged/'clip',[]
    forgeries = [dict(backbone=name.format(clip=clip), pretrained=weights) for name in NAMES
                 for weights in ('none', None)]
    forgeries += [dict(backbone='RN50', pretrained='openai'), dict(backbone='ViT-B-32', pretrained='laion2b_e16'),
                  dict(backbone='ViT-B-16-SigLIP', pretrained='webli'),
                  dict(backbone='roberta-ViT-B-32', pretrained='none'), dict(pretrained=str(forged/'weights.pt')),
                  dict(pretrained='hf-hub:evil/model'), dict(pretrained=['openai']),
                  dict(framework='opentrans.cli'), dict(framework='../evil'), dict(framework=str(clip/'evil.py')),
                  dict(preset='evil'), dict(backbone=dict(model_cfg=1)),
                  dict(allow_hub=True, backbone='hf-hub:evil/model'), dict(clip=dict(mean='evil')),
                  dict(clip=dict(mean=[0, 0])), dict(output_stride='8')]
    for i,changes in enumerate(forgeries):
        folder = tmp_path/str(i)
        write(folder/'model.json', {**told, **changes})
        (folder/'model.safetensors').write_bytes((forged/'weights.safetensors').read_bytes())
        jobs += [['evaluate', '--model', str(folder)],
                 ['segment', photo, 'sky', '--model', str(folder), '--out', str(tmp_path/'p.png')]]
    write(tmp_path/'plain'/'model.json', told)
    (tmp_path/'plain'/'model.safetensors').write_bytes((forged/'weights.safetensors').read_bytes())
    jobs += [['evaluate', '--model', str(tmp_path/'plain')]]
    is_harmless(watched(jobs))

def test_a_name_of_a_library_runs_nothing_and_fetches_nothing(watched, forged, tmp_path):
    "Models of timm and torchvision, in every command that takes one; and weights for them that are pickles."
    from PIL import Image
    pictures = tmp_path/'pictures'
    for split,label in ((split, label) for split in ('train', 'val') for label in 'ab'):
        (pictures/split/label).mkdir(parents=True)
        for i in range(2): Image.new('RGB', (32, 32), (80*i, 0, 0)).save(pictures/split/label/f'{i}.png')
    clip,out = str(forged/'clip'),['--out', str(tmp_path/'out')]
    names = ['hf-hub:evil/model', 'hf_hub:evil/model', f'local-dir:{clip}', 'resnet18.a/b', 'resnet18.hf-hub:a/b', clip]
    jobs = [['alpha', f'{library}:{name}', '--pretrained', 'none']
            for name in names for library in ('timm', 'torchvision')]
    jobs += [['alpha', f'timm:{names[0]}'], ['alpha', 'hf:evil/model'], ['alpha', 'timm:resnet18', '--pretrained', 'x'],
             ['alpha', 'torchvision:resnet18', '--pretrained', 'DEFAULT']]
    for command,option in (('spt', '--model'), ('stitch', '--models'), ('spvit', '--model')):
        whole = 'resnet18' if option == '--model' else 'resnet18,resnet34'
        begun = [command, str(pictures), *out]
        jobs += [[*begun, option, name if option == '--model' else f'{name},resnet18', '--pretrained', 'none']
                 for name in names]
        jobs += [[*begun, option, whole, '--pretrained', 'timm'], [*begun, option, whole, '--pretrained', names[0]]]
        jobs += [[*begun, option, whole, '--pretrained', str(forged/f'weights.{suffix}')]
                 for suffix in ('pt', 'safetensors')]
    jobs += [['alpha', str(forged/f'weights.{suffix}')] for suffix in ('pt', 'pth', 'bin', 'safetensors')]
    jobs += [['alpha', str(forged)]]
    is_harmless(watched(jobs))

def test_no_other_file_runs(watched, forged, mask, photo, tmp_path):
    "Masks, selections, recipes, checkpoints, results and lists of classes that are pickles, or name things to run."
    pickles = [str(forged/f'weights.{suffix}') for suffix in ('pt', 'pth', 'bin', 'pkl', 'safetensors')]
    few = ('--iterations', '1', '--batch-size', '1')
    jobs = [['transfer', mask, path, '--out', f'{tmp_path}/x.safetensors'] for path in pickles]
    for path in pickles:
        jobs += [['transfer', path, *few], ['alpha', '--mask', path], ['alpha', '--pretrained', path],
                 ['cost', '--mask', path], ['cka', '--mask', path], ['evaluate', '--mask', path],
                 ['compare', path], ['finetune', '--out', f'{tmp_path}/run', '--selection', path, *few],
                 ['finetune', '--out', f'{tmp_path}/run', '--mask', path, *few],
                 ['segment', path, 'sky', '--out', f'{tmp_path}/p.png'],
                 ['finetune', '--out', f'{tmp_path}/run', '--recipe', path], ['evaluate', '--config', path],
                 ['study', 'ratio', '--scale', 'gpu', '--pretrained', path, '--out', f'{tmp_path}/study']]
    yaml = str(forged/'run.yaml')
    jobs += [['finetune', '--out', f'{tmp_path}/run', '--recipe', yaml], ['alpha', '--config', yaml],
             ['evaluate', '--data', 'folder', '--root', str(forged), '--classes', str(forged/'clip'/'text.json')],
             ['evaluate', '--framework', str(forged/'clip')], ['evaluate', '--data', f'local-dir:{forged}'],
             ['data', 'check', 'hf-hub:evil/data']]
    is_harmless(watched(jobs))

LOADERS = '''
ClipBackbone.create({name!r})
ClipBackbone.create({name!r}, pretrained={name!r})
ClipBackbone.create({name!r}, hub=False)
ClipBackbone.create('shapes-rn', pretrained={path!r})
ClipBackbone.create('RN50', pretrained='openai', hub=False)
open_model({name!r})
open_model('RN50', {path!r})
small_config({name!r})
small_clip({name!r})
small_clip({text!r})
small_clip({vision!r})
small_clip({timm!r})
small_clip(json.load(open({text!r})))
small_clip(json.load(open({vision!r})))
read_weights({path!r})
get_framework({name!r})
build({name!r}, ClipBackbone.create('shapes-rn'))
build('deeplabv3', ClipBackbone.create('shapes-rn'), preset={name!r})
load_framework(build('deeplabv3', ClipBackbone.create('shapes-rn'), ['sky'], preset='small'), {path!r})
load_mask2former(build('mask2former', ClipBackbone.create('shapes-rn'), ['sky'], preset='small'), {path!r})
load_fcclip(build('fcclip', ClipBackbone.create('shapes-rn'), ['sky'], preset='small'), {path!r})
SparseMask.load({path!r})
LayerSelection.from_json({path!r})
load_baked({path!r})
transfer_checkpoint(SparseMask.load({mask!r}), {path!r}, 'x.safetensors')
Recipe.of(read_settings({yaml!r}))
LayerTable.load({path!r})
compare_runs([{path!r}])
open_dataset({name!r})
open_weights({path!r})
open_weights('timm:' + {name!r})
load_catseg(build('catseg', ClipBackbone.create('shapes-vit'), ['sky'], preset='small'), {path!r})
load_sed(build('sed', ClipBackbone.create('shapes-convnext'), ['sky'], preset='small'), {path!r})
load_faseg(build('faseg', ClipBackbone.create('shapes-rn'), ['sky'], preset='small'), {path!r})
Allocation.load({path!r})
Sensitivity.load({path!r})
HybridSpec.from_json({path!r})
open_classifier({name!r}, 2, 'none')
open_classifier('resnet18', 2, {path!r})
read_join({path!r})
'''

IMPORTS = '''
import json
from opentrans.all import *
from opentrans.clip import open_model, read_weights, small_clip, small_config
from opentrans.finetune import compare_runs, load_framework, read_settings
from opentrans.frameworks.contract import get_framework
from opentrans.frameworks.fcclip import load_fcclip
from opentrans.frameworks.mask2former import load_mask2former
from opentrans.playground import playground
from opentrans.pruning import load_baked, transfer_checkpoint
from opentrans.clip.photo import read_join
from opentrans.frameworks.catseg import load_catseg
from opentrans.frameworks.faseg import load_faseg
from opentrans.frameworks.sed import load_sed
from opentrans.heavy_tail.words import open_weights
from opentrans.vit.hybrids import HybridSpec
from opentrans.vit.products import open_model as open_classifier
from opentrans.vit.sensitivity import Sensitivity
from opentrans.vit.spt import Allocation
'''

def test_no_loader_runs_or_fetches(watched, forged, mask):
    "Every function of Python that takes a name or a path."
    clip,jobs = forged/'clip',[]
    for name in (f'local-dir:{clip}', 'hf-hub:evil/model', str(clip/'text.json')):
        for suffix in ('pt', 'pkl', 'safetensors'):
            text = LOADERS.format(name=name, path=str(forged/f'weights.{suffix}'), text=str(clip/'text.json'),
                                  vision=str(clip/'vision.json'), timm=str(clip/'timm_hub.json'),
                                  yaml=str(forged/'run.yaml'), mask=mask)
            jobs += [IMPORTS + line for line in text.strip().splitlines()]
    is_harmless(watched(dict.fromkeys(jobs)))

def test_the_playground_says_what_it_cannot_open(watched, forged):
    line = (
        f"print(playground(ClipBackbone.create('shapes-rn'), "
        f"dict(a={str(forged/'weights.pt')!r})).playground.said.value)")
    (result,) = watched([IMPORTS + line])
    assert not result['ran'] and not result['seen'] and 'is not an image of a known kind' in result['said'], result

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub of one repository, 'org/clip', as a folder: what is asked of it is listed."
    import huggingface_hub
    from opentrans.clip import open_model, save_weights
    asked,folder = [],tmp_path/'hub'
    config = dict(embed_dim=32, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64),
                  text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))
    def download(repository, file, cache_dir=None):
        asked.append(f'{repository}/{file}')
        if not (folder/file).is_file(): raise FileNotFoundError(file)
        return str(folder/file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    def publish(**changes):
        write(folder/'open_clip_config.json',
              dict(model_cfg={**config, **changes}, preprocess_cfg=dict(mean=[.5, .5, .5], std=[.25, .25, .25])))
    publish()
    model,*_ = open_model('hf-hub:org/clip', hub=True, quick_gelu=True)
    save_weights(model, folder/'open_clip_model.safetensors')
    asked.clear()
    return publish,asked,folder

def test_a_hub_is_asked_where_the_user_says_so(hub):
    "By name, with the weights and the normalisation of the repository; and only so."
    from opentrans.clip import ClipBackbone
    from opentrans.errors import OpenTransError
    publish,asked,folder = hub
    clip = ClipBackbone.create('hf-hub:org/clip', pretrained='hf-hub:org/clip', hub=True)
    assert asked == ['org/clip/open_clip_config.json', 'org/clip/open_clip_model.safetensors']
    assert clip.origin.mean == (.5, .5, .5) and clip.origin.std == (.25, .25, .25) and clip.image_size == 64
    assert type(
        clip.text.model.transformer.resblocks[0].mlp.gelu).__name__ == 'QuickGELU', 'the file of weights tells'
    asked.clear()
    for allowed in (None, False):
        with pytest.raises(OpenTransError, match='unless you allow it'):
            ClipBackbone.create('hf-hub:org/clip', pretrained='hf-hub:org/clip', hub=allowed)
    for name in ('hf-hub:', 'hf-hub:a/b/c', 'hf-hub:../x', 'hf-hub:https://a'):
        with pytest.raises(OpenTransError, match='no repository of the Hugging Face hub'):
            ClipBackbone.create(name, hub=True)
    assert not asked
    os.remove(folder/'open_clip_model.safetensors')
    with pytest.raises(OpenTransError, match='could not be downloaded'):
        ClipBackbone.create('hf-hub:org/clip', pretrained='hf-hub:org/clip', hub=True)

def test_the_command_asks_the_hub_where_the_user_says_so(hub, monkeypatch, capsys):
    from opentrans.cli import main
    _,asked,_ = hub
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['opentrans', *args])
        with pytest.raises(SystemExit) as ended: main()
        return ended.value.code or 0
    assert run('cost', 'hf-hub:org/clip') == 2 and not asked and '--allow-hub' in capsys.readouterr().err
    assert (run('cost', 'hf-hub:org/clip', '--allow-hub', '--size', '64x64', '--json') == 0
            and asked == ['org/clip/open_clip_config.json'])
    assert json.loads(capsys.readouterr().out)['params'] > 1000

@pytest.mark.parametrize('changes',
                         [
                             dict(text_cfg=dict(hf_tokenizer_name='org/words',
                                                tokenizer_kwargs=dict(trust_remote_code=True))),
                             dict(text_cfg=dict(tokenizer_kwargs=dict(proxies=dict(https='evil')))),
                             dict(text_cfg=dict(hf_model_name='org/text')),
                             dict(vision_cfg=dict(timm_model_name='hf-hub:org/vision')),
                             dict(vision_cfg=dict(timm_model_name='local-dir:x')), dict(multimodal_cfg={}),
                             dict(text_cfg=None), dict(embed_dim='wide'),
                             dict(text_cfg=dict(hf_tokenizer_name='../words'))])
def test_a_repository_of_the_hub_runs_nothing(hub, changes):
    "Not even where the user allowed the hub."
    from opentrans.clip import ClipBackbone
    from opentrans.errors import OpenTransError
    publish,asked,_ = hub
    publish(**changes)
    with pytest.raises(OpenTransError): ClipBackbone.create('hf-hub:org/clip', hub=True)
    assert asked == ['org/clip/open_clip_config.json']

def test_timms_weights_are_not_fetched_for_a_repository(hub):
    "`timm_model_pretrained` would fetch weights that are overwritten, or that stand for random ones."
    from opentrans.clip import ClipBackbone
    publish,asked,_ = hub
    publish(vision_cfg=dict(timm_model_name='test_convnext', timm_model_pretrained=True, image_size=64))
    assert (ClipBackbone.create('hf-hub:org/clip', hub=True).embed_dim == 32
            and asked == ['org/clip/open_clip_config.json'])

def cached(cache, repository, **files):
    "A repository of the hub as its library keeps it after a download."
    place = cache/f"models--{repository.replace('/', '--')}"
    for name,text in files.items(): write(place/'snapshots'/('a'*40)/name.replace('__', '.'), text)
    write(place/'refs'/'main', 'a'*40)

def test_a_tokenizer_that_was_downloaded_brings_no_code(watched, forged, tmp_path):
    """From the cache a tokenizer is taken without the network, but code that lies beside it is not run, nor asked
    for."""
    cached(tmp_path, 'org/words', tokenizer_config__json=(forged/'clip'/'tokenizer_config.json').read_text(),
           config__json=(forged/'clip'/'config.json').read_text(), evil__py=(forged/'clip'/'evil.py').read_text())
    line = (
        f"import opentrans.clip.weights as c\nwith c._text_from_hub('mine', dict(hf_tokenizer_name='org/words'), "
        f"{{}}, {str(tmp_path)!r}): c._tokenizer(dict(hf_tokenizer_name='org/words'), {str(tmp_path)!r})")
    for allowed in (False, True):
        (result,) = watched([line.format(allowed)])
        assert not result['ran'] and 'trust_remote_code=True' in result['said'], result
        assert allowed or not result['seen'], result

def test_no_architecture_of_open_clip_asks_the_network_by_itself(watched):
    "Those whose texts need the hub say so, before anything is built; the rest are built from what is here."
    import open_clip
    far = [name
           for name in open_clip.list_models()
           if (cfg := open_clip.get_model_config(name)) and 'multimodal_cfg' not in cfg
           and {'hf_model_name', 'hf_tokenizer_name'} & set(cfg['text_cfg'])]
    assert len(far) > 40
    is_harmless(watched([IMPORTS + f'open_model({name!r})' for name in far]), 'of the Hugging Face hub')

ODD = ('[q]', '[/red]', '[bold]sky', ':smile:', '$x_{$', '$', '_hidden', '\\frac{', '<script>alert(1)</script>',
       '=HYPERLINK("a")', '+1', '@sum', 'a|b', '\x1b[31mred', '\x9b31m', '\u202eyks', '{0:>20}', '{', 'a\nb', '*',
       '`', '&amp;', "it's")

def drawn(figure):
    "Draw a figure, as saving it does, and give the texts on it."
    import matplotlib.text
    figure = getattr(figure, 'figure', figure)
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]

@pytest.mark.parametrize('name', ODD)
def test_a_name_is_shown_in_a_terminal_as_it_is(name, capsys):
    "As row, column, cell and title of a table: no markup, no emoji, no command to the terminal."
    import pandas as pd
    from opentrans.cli import show
    from opentrans.escape import printable
    def squeezed(text): return ''.join(text.split()) # a title is broken where the table ends
    wanted = squeezed(printable(name).split('\n')[0])
    for result,title in (({name: 1.5}, ''), (pd.DataFrame({name: [1.]}, index=['row']), ''), ({'row': name}, ''),
                         ({'row': 1.}, name)):
        show(result, title=title)
        said = capsys.readouterr().out
        assert wanted in squeezed(said) and '\x1b' not in said and '\x9b' not in said and '\u202e' not in said, said
    show({name: name}, as_json=True)
    said = capsys.readouterr().out
    assert json.loads(said) == {name: name} and said.isascii()

@pytest.mark.parametrize('name',
                         ['$x_{$', '$', '_hidden', '\\frac{$', '<script>a</script>', '\x1b[31mred', 'a$b$c_d'])
def test_a_name_is_drawn_as_it_is(name):
    "In every plot that shows names of classes, layers, masks, runs or arms."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch
    from torch import nn
    from opentrans.cka import plot_cka
    from opentrans.cost import cost
    from opentrans.data import show_sample
    from opentrans.escape import for_plot
    from opentrans.training import plot_runs
    from opentrans.heavy_tail import LayerTable, Spectrum, plot_choices
    from opentrans.playground import overlay
    from opentrans.pruning import SparseMask, plot_overlap
    from opentrans.vit.spt import plot_profile
    from opentrans.vit.stitch_training import plot_pareto
    x = torch.rand(3, 16, 16)
    labels = torch.zeros(16, 16, dtype=torch.long)
    wanted = for_plot(name)
    def shown(axes):
        texts = drawn(axes)
        assert any(wanted.strip() in text for text in texts), (name, texts)
        plt.close('all')
    shown(overlay(x, labels, [name, 'other']))
    sample = dict(image=x, labels=labels, regions=torch.ones(1, 16, 16, dtype=torch.bool),
                  region_classes=torch.tensor([0]))
    shown(show_sample(sample, 'regions', vocabulary=type('Names', (), dict(names=[name]))))
    shown(plot_cka(pd.DataFrame([[.5]], [name], [name])))
    shown(
        plot_runs(pd.DataFrame(dict(framework=[name, 'b'], miou=[.1, .2], active_params_M=[1., 2.]),
                               index=[name, 'b'])))
    net = nn.Sequential()
    net.add_module(name.replace('.', ''), nn.Linear(8, 8))
    mask = SparseMask.magnitude(net, .5, skip_first=False)
    shown(mask.plot())
    shown(mask.plot(label=name))
    shown(plot_overlap({name: mask, 'b': mask}))
    shown(cost(net, (1, 8)).plot())
    assert '<script>' not in cost(net, (1, 8)).to_markdown('stage')
    spectra = [Spectrum(name=name, kind='linear', shape=(8, 8), evals=torch.linspace(.1, 3, 60).double().numpy())]
    table = LayerTable(spectra, 'ks')
    shown(table.plot_esd(name))
    shown(table.plot_ks(name))
    shown(table.plot_change(table))
    shown(plot_choices({name: table}))
    assert '<script>' not in table._repr_html_()
    profile = pd.DataFrame(dict(share=[.5]), index=pd.Index([name], name='operation'))
    shown(plot_profile({name: profile, 'b': profile}))
    shown(plot_pareto(pd.DataFrame(dict(flops=[1e6, 2e6], value=[1., 2.])), label=name))

def test_names_on_the_command_line_are_shown(photo, tmp_path):
    "From the command to its picture and its tables: what was a traceback, or vanished."
    import contextlib, io, warnings
    from opentrans.cli import main
    def command(*args):
        out,before = io.StringIO(),sys.argv
        sys.argv = ['opentrans', *args]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                main()
        except SystemExit as ended: assert not ended.code, out.getvalue()
        finally: sys.argv = before
        return out.getvalue()
    said = command('segment', photo, '$x_{$, [/red], [bold]a, _b, =c', '--out', str(tmp_path/'p.png'))
    assert (all(name in said for name in ('$x_{$', '[/red]', '[bold]a', '_b', '=c'))
            and (tmp_path/'p.png').stat().st_size > 1000)
    said = command('alpha', 'shapes-vit', '--out', str(tmp_path/'alpha'))
    assert (all(f'in_proj_weight[{part}]' in said for part in 'qkv')
            and 'in_proj_weight[q]' in (tmp_path/'alpha'/'alpha.csv').read_text())
    for run in ('=HYPERLINK(1)', '[red]', '$x_{$'):
        write(tmp_path/run/'result.json',
              dict(miou=.5, framework='=1+1', params=1e6, active_params=1e6, macs=1e6, active_macs=1e6))
    said = command('compare', *(str(tmp_path/run) for run in ('=HYPERLINK(1)', '[red]', '$x_{$')), '--out',
                   str(tmp_path/'c'))
    assert all(run in said for run in ('=HYPERLINK(1)', '[red]', '$x_{$'))
    cells = [cell for line in (tmp_path/'c'/'runs.csv').read_text().splitlines() for cell in line.split(',')]
    assert ("'=HYPERLINK(1)" in cells and "'=1+1" in cells
            and not any(cell.startswith(('=', '+', '@')) for cell in cells))
