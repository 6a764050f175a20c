"""detectron2 from outside: without it, in two processes, in mixed precision, on a ViT, and in the public training scripts of Mask2Former and FC-CLIP.

The last ones need those projects' folders: OPENTRANS_MASK2FORMER and OPENTRANS_FCCLIP (and, for panoptic data, panopticapi on the path). They run with random weights on generated scenes."""
import importlib.util, json, os, subprocess, sys, warnings
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import nn
from opentrans.clip import ClipBackbone
from opentrans.core import layers, LayerSelection
from opentrans.errors import OpenTransError
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.detectron2 import MaskHook, OpenTransCLIP, SelectionHook, drop_frozen
from opentrans.pruning import SparseMask

with warnings.catch_warnings():
    warnings.simplefilter('ignore')                                     # detectron2 uses parts of torch that torch wants to retire
    try: from detectron2.checkpoint import DetectionCheckpointer; from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks; reason = ''
    except ImportError as e: reason,HookBase = f'detectron2 is not installed ({e})',object
needs_detectron2 = pytest.mark.skipif(bool(reason), reason=reason or 'detectron2 is installed')

# Without detectron2

def test_without_detectron2():
    "The library does not import detectron2; without it the module can be imported, what needs it says how to get it, and checkpoints are converted."
    code = '''
import sys
from opentrans.all import *
assert 'detectron2' not in sys.modules
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'detectron2': raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing())
import opentrans.frameworks.detectron2 as d
from opentrans.core import OpenTransError
for f in (d.MaskHook, d.SelectionHook, d.OpenTransCLIP, lambda: d.add_opentrans_config(None), lambda: d.deeplab_config('a'), lambda: d.from_catalog('a'), lambda: d.register_catalog(None, 'a', '.')):
    try: f()
    except OpenTransError as e: assert "opentrans[detectron2]" in str(e), e
    else: raise AssertionError(f)
import torch
assert list(d.convert_checkpoint({'layer1.0.conv1.weight': torch.ones(1), 'conv3.weight': torch.ones(1)}, 'detectron2')[0])[0] == 'backbone.visual.layer1.0.conv1.weight'
'''
    subprocess.run([sys.executable, '-c', code], check=True)

# What an optimizer holds

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=3), min_size=1, max_size=4).filter(lambda gs: any(map(any, gs))), st.sampled_from([torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]))
def test_the_optimizer_holds_what_learns(learns, kind):
    "Whatever rests is gone with its state, groups and their settings stay, and a new optimizer that is treated the same takes the old one's state."
    def build():
        torch.manual_seed(0)
        groups = [[nn.Parameter(torch.randn(2)) for _ in g] for g in learns]
        return groups,kind([dict(params=g, lr=.01*(i+1)) for i,g in enumerate(groups)], weight_decay=.1)
    def rest(groups):
        for g,l in zip(groups, learns):
            for p,b in zip(g, l): p.requires_grad_(b)
    groups,opt = build()
    sum(p.square().sum() for g in groups for p in g).backward(); opt.step()
    rest(groups)
    assert drop_frozen(opt) == sum(not b for g in learns for b in g)
    assert [[id(p) for p in q['params']] for q in opt.param_groups] == [[id(p) for p,b in zip(g, l) if b] for g,l in zip(groups, learns)]
    assert [q['lr'] for q in opt.param_groups] == [.01*(i+1) for i in range(len(learns))]
    assert {id(p) for p in opt.state} <= {id(p) for q in opt.param_groups for p in q['params']}
    groups,again = build(); rest(groups); drop_frozen(again); again.load_state_dict(opt.state_dict())

# A trainer, in one process and in two

class Toy(nn.Module):
    "A linear map from the last features of a backbone to four numbers an image."
    def __init__(self, clip):
        super().__init__()
        self.backbone = OpenTransCLIP(clip=clip)
        self.head = nn.Linear(self.backbone.output_shape()['res5'].channels, 4)
    def forward(self, batch): return dict(mse=(self.head(self.backbone(batch['x'])['res5'].mean((2, 3))) - batch['y']).square().mean())

def batches(start=0, rank=0):
    "Batch i is the same in every run."
    while True:
        g = torch.Generator().manual_seed(100*start+rank); start += 1
        yield dict(x=torch.rand(4, 3, 32, 32, generator=g), y=torch.rand(4, 4, generator=g))

def small(seed=0): torch.manual_seed(seed); return Toy(tiny_backbone(seed, width=4))
def zeros(model, mask): return all(not w[~mask[n]].any() for n,w in mask.weights(model).items())

def distributed(rank, port, folder):
    warnings.simplefilter('ignore'); torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    mask,ends = SparseMask.magnitude(tiny_backbone(width=4).tower, .1),{}
    for name,start,stop in (('whole', 0, 5), ('cut', 0, 3), ('cut', 3, 5)):
        model = small(); wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        trainer = SimpleTrainer(wrapped, batches(start, rank), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.05, momentum=.9, weight_decay=.01))
        checkpointer = DetectionCheckpointer(wrapped, str(folder), trainer=trainer)
        trainer.register_hooks([MaskHook(mask), pick := SelectionHook(2)])
        if start: checkpointer.load(f'{folder}/{name}.pth'); assert trainer.iter+1 == start
        trainer.train(start, stop)
        trainer.iter = stop-1; checkpointer.save(name); dist.barrier()
        assert zeros(model, mask) and (trainer.model is not wrapped) and trainer.model.broadcast_buffers is False
        assert (pick.table is None) == bool(start)                          # a resumed run does not look again
        both = [None, None]; dist.all_gather_object(both, {k: v for k,v in model.named_parameters()})
        assert all(torch.equal(both[0][k], both[1][k]) for k in both[0]), 'the two processes have gone apart'
        ends[name] = {k: v.clone() for k,v in model.state_dict().items()},pick.selection
    same = dict(model.named_parameters()) if rank else ends['whole'][0]       # detectron2 saves the statistics of the first process's norms, for all
    assert ends['whole'][1] == ends['cut'][1] and all(torch.equal(ends['whole'][0][k], ends['cut'][0][k]) for k in same)
    torch.save(ends['whole'][1].freeze, f'{folder}/frozen{rank}.pt')
    dist.destroy_process_group()

@needs_detectron2
def test_two_processes_choose_together_and_resume(tmp_path):
    "In DistributedDataParallel: one choice, no wait for gradients that do not come, equal weights, and a stopped run ends as one that was not."
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(distributed, (port, tmp_path), nprocs=2)
    a,b = (torch.load(tmp_path/f'frozen{r}.pt', weights_only=True) for r in (0, 1))
    assert a == b and len(a) > 3

@needs_detectron2
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision(monkeypatch):
    "AMPTrainer: a step that overflows is skipped, and the mask is in force throughout. On a machine without CUDA its check for CUDA is answered yes; scaler and autocast then work on the CPU."
    cuda = torch.cuda.is_available()
    model = small().to('cuda' if cuda else 'cpu')
    mask = SparseMask.magnitude(tiny_backbone(width=4).tower, .1)
    move = lambda b: {k: v.to(next(model.parameters()).device) for k,v in b.items()}
    scaler = torch.amp.GradScaler('cuda' if cuda else 'cpu', init_scale=2.**8, growth_interval=2)
    trainer = AMPTrainer(model, map(move, batches()), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=.9), grad_scaler=scaler)
    before,scales = [],[]
    class Overflow(HookBase):
        def after_backward(self):
            before.append(model.head.weight.detach().clone())
            if self.trainer.iter == 2: model.head.weight.grad.fill_(torch.inf)
        def after_step(self):
            assert zeros(model, mask); scales.append(scaler.get_scale())
            assert torch.equal(before[-1], model.head.weight) == (self.trainer.iter == 2), 'the step that overflowed was not skipped, or another was'
    trainer.register_hooks([MaskHook(mask), SelectionHook(3), Overflow()])
    if not cuda: monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    trainer.train(0, 5)
    assert scales[2] < scales[1]

@needs_detectron2
def test_parts_of_a_packed_projection_rest_over_a_resume(tmp_path):
    "On a ViT, q rests and k and v learn, by rows of one parameter; resumed, the run ends with the same weights."
    import open_clip
    text = tiny_backbone().text
    def vit():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(16, dict(image_size=32, layers=4, width=32, head_width=16, patch_size=8), open_clip.model.CLIPTextCfg(context_length=16, vocab_size=len(text.tokenizer), width=32, heads=2, layers=1))
        return Toy(ClipBackbone.from_model(model, text.tokenizer, 'tiny ViT'))
    names = [l.name for l in layers(vit().backbone)]
    selection = LayerSelection([n for n in names if '[q]' not in n], [n for n in names if '[q]' in n], 'q rests')
    assert len(selection.freeze) == 4
    ends = []
    for cuts in ((5,), (3, 5)):
        folder = tmp_path/str(len(cuts)); folder.mkdir()
        for stop in cuts:
            model = vit(); start = 0
            trainer = SimpleTrainer(model, None, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=.1))
            checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
            trainer.register_hooks([SelectionHook(2, selection=selection), hooks.PeriodicCheckpointer(checkpointer, 1)])
            checkpointer.resume_or_load('', resume=True)
            if checkpointer.has_checkpoint(): start = trainer.iter+1
            trainer.data_loader = batches(start)
            trainer.train(start, stop)
        ends.append(model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k,v in ends[0].items())
    at = torch.load(tmp_path/'1'/'model_0000001.pth', weights_only=True)['model']
    key = 'backbone.visual.transformer.resblocks.0.attn.in_proj_weight'
    assert torch.equal(at[key][:32], ends[0][key][:32]) and not torch.equal(at[key][32:], ends[0][key][32:])

# The public training scripts

SCRIPT = r'''
import contextlib, importlib.util, json, logging, os, sys, types, warnings
warnings.simplefilter('ignore')
kind,repo,work,iters = *sys.argv[1:4],int(sys.argv[4])
sys.path.insert(0, repo); os.chdir(repo)                                # FC-CLIP reads a file of its folder when it is imported
import torch
if not importlib.util.find_spec('MultiScaleDeformableAttention'):       # not built here: both projects then compute it with PyTorch
    sys.modules['MultiScaleDeformableAttention'] = types.ModuleType('MultiScaleDeformableAttention')
import train_net
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.projects.deeplab import add_deeplab_config
from opentrans.core import OpenTransError, layers
from opentrans.data import ShapesWorld
from opentrans.frameworks.detectron2 import MaskHook, SelectionHook, add_opentrans_config, image_tower, register_catalog
if kind == 'fcclip':                                                    # it hands the text encoder (length, batch, width); newer open_clip wants (batch, length, width)
    from fcclip.modeling.backbone.clip import CLIP
    CLIP.encode_text = lambda self, text, normalize=False: self.clip_model.encode_text(text, normalize=normalize)
os.chdir(work); torch.manual_seed(0)

cfg = get_cfg()
add_deeplab_config(cfg); train_net.add_maskformer2_config(cfg)
if kind == 'fcclip': train_net.add_fcclip_config(cfg)
else: add_opentrans_config(cfg)                                         # the first line
cfg.merge_from_file(f'{repo}/configs/coco/panoptic-segmentation/' + ('fcclip/fcclip_convnext_large_eval_ade20k_r50.yaml' if kind == 'fcclip' else 'maskformer2_R50_bs16_50ep.yaml'))
world = ShapesWorld('train', 'crowd', n=4, size=64)
register_catalog(world, 'shapes', work)
own = ['MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS', ''] if kind == 'fcclip' else ['MODEL.BACKBONE.NAME', 'OpenTransCLIP']
cfg.merge_from_list(own + ['MODEL.DEVICE', 'cpu', 'MODEL.WEIGHTS', '', 'MODEL.SEM_SEG_HEAD.NUM_CLASSES', len(world.vocabulary), 'MODEL.MASK_FORMER.TRAIN_NUM_POINTS', 256,
    'DATASETS.TRAIN', ('shapes',), 'DATASETS.TEST', ('shapes',), 'INPUT.DATASET_MAPPER_NAME', 'coco_panoptic_lsj' if importlib.util.find_spec('panopticapi') else 'mask_former_semantic',
    'INPUT.IMAGE_SIZE', 64, 'INPUT.MIN_SIZE_TRAIN', (64,), 'INPUT.CROP.ENABLED', False, 'DATALOADER.NUM_WORKERS', 0, 'SOLVER.IMS_PER_BATCH', 2, 'SOLVER.MAX_ITER', iters,
    'SOLVER.CHECKPOINT_PERIOD', 1000, 'SOLVER.AMP.ENABLED', False, 'OUTPUT_DIR', work, 'SEED', 0])

class Trainer(train_net.Trainer):
    "The project's trainer, without tensorboard and without the evaluation at the end."
    def build_writers(self): return []
    @classmethod
    def test(cls, cfg, model, evaluators=None): return {}

with open(os.devnull, 'w') as f, contextlib.redirect_stdout(f):
    trainer = Trainer(cfg); logging.disable(logging.CRITICAL)
    hook,pick,seen,out = MaskHook('mask.safetensors', iteration=1),SelectionHook(2),[],{}
    class Watch(HookBase):
        def after_step(self): seen.append(dict(density=hook.density, loss=float(trainer.storage.latest()['total_loss'][0]), held=sum(len(g['params']) for g in trainer.optimizer.param_groups)))
    trainer.register_hooks([hook, *([pick] if kind != 'fcclip' else []), Watch()])   # the second line
    trainer.resume_or_load(resume=True)
    trainer.train()
if kind == 'fcclip':
    pick.trainer = trainer
    try: pick.choose()
    except OpenTransError as e: out['refused'] = str(e)
else: out.update(train=pick.selection.train, freeze=pick.selection.freeze, looked=pick.table is not None)
names = {id(p): n for n,p in trainer.model.named_parameters()}
places = {names[id(l.param)][:-len(l.key)] for l in layers(image_tower(trainer.model))}
json.dump(dict(out, seen=seen, places=sorted(places), start=trainer.start_iter, model=type(trainer.model).__name__), open('out.json', 'w'))
'''

def public(kind, variable, work, iters):
    "Run a project's own trainer in a process of its own; the names that both projects register would collide in one."
    repo = os.environ.get(variable)
    if not repo: pytest.skip(f'{variable} is not set: give the folder of the public code')
    if not importlib.util.find_spec('cv2'): pytest.skip('the public code needs OpenCV: pip install opencv-python-headless')
    done = subprocess.run([sys.executable, '-c', SCRIPT, kind, str(Path(repo).resolve()), str(work), str(iters)], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work/'out.json').read_text())

@pytest.fixture(scope='module')
def rn50_mask(): return SparseMask.magnitude(ClipBackbone.create('RN50', pretrained=None).tower, .1)

@needs_detectron2
def test_public_mask2former(rn50_mask, tmp_path):
    "The mask's file goes in at iteration 1, layers rest from iteration 2 on, a resumed run goes on so; its backbone is ours by name in the configuration."
    rn50_mask.save(tmp_path/'mask.safetensors')
    r = public('mask2former', 'OPENTRANS_MASK2FORMER', tmp_path, 4)
    assert r['model'] == 'MaskFormer' and r['places'] == ['backbone.visual.']
    densities,held = [s['density'] for s in r['seen']],[s['held'] for s in r['seen']]
    assert densities[0] > .999 and all(abs(d-.1) < 1e-4 for d in densities[1:]) and all(s['loss'] == s['loss'] for s in r['seen'])
    assert held[0] == held[1] > held[2] == held[3] and held[1]-held[2] == len(r['freeze']) and len(r['train']) + len(r['freeze']) == 55
    again = public('mask2former', 'OPENTRANS_MASK2FORMER', tmp_path, 5)
    assert again['start'] == 4 and not again['looked'] and again['freeze'] == r['freeze'] and again['seen'][0]['held'] == held[3] and abs(again['seen'][0]['density']-.1) < 1e-4

@needs_detectron2
def test_public_fcclip(rn50_mask, tmp_path):
    "The same file goes into FC-CLIP's own backbone; that one is frozen by design, so that there are no layers to choose, which is said."
    rn50_mask.save(tmp_path/'mask.safetensors')
    r = public('fcclip', 'OPENTRANS_FCCLIP', tmp_path, 3)
    assert r['model'] == 'FCCLIP' and r['places'] == ['backbone.clip_model.visual.']
    densities = [s['density'] for s in r['seen']]
    assert densities[0] > .999 and all(abs(d-.1) < 1e-4 for d in densities[1:]) and 'frozen' in r['refused']
