"""detectron2 from outside: without it, in two processes, in mixed precision, on a ViT, and in public scripts.

The last ones need the folders of Mask2Former and FC-CLIP, OPENTRANS_MASK2FORMER and OPENTRANS_FCCLIP (and, for
panoptic data, panopticapi on the path). They run with random weights on generated scenes."""
import importlib.util, json, os, socket, subprocess, sys, warnings
from pathlib import Path
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import nn
from forked import python
from opentrans.clip import ClipBackbone
from opentrans.core import layers, LayerSelection
from opentrans.frameworks.contract import tiny_backbone
from opentrans.frameworks.detectron2 import drop_frozen, MaskHook, OpenTransCLIP, SelectionHook
from opentrans.pruning import SparseMask

reason = ''
with warnings.catch_warnings():
    warnings.simplefilter('ignore')                     # detectron2 uses parts of torch that torch wants to retire
    try:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
    except ImportError as error: reason,HookBase = f'detectron2 is not installed ({error})',object
needs_detectron2 = pytest.mark.skipif(bool(reason), reason=reason or 'detectron2 is installed')

# Without detectron2

WITHOUT = """
import sys
from opentrans.all import *
assert 'detectron2' not in sys.modules
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'detectron2': raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing())
import opentrans.frameworks.detectron2 as d
from opentrans.core import OpenTransError
calls = ((d.MaskHook,), (d.SelectionHook,), (d.OpenTransCLIP,), (d.add_opentrans_config, None),
         (d.deeplab_config, 'a'), (d.from_catalog, 'a'), (d.register_catalog, None, 'a', '.'))
for function,*args in calls:
    try: function(*args)
    except OpenTransError as error: assert 'opentrans[detectron2]' in str(error), error
    else: raise AssertionError(function)
import torch
ones = {'layer1.0.conv1.weight': torch.ones(1), 'conv3.weight': torch.ones(1)}
assert list(d.convert_checkpoint(ones, 'detectron2')[0])[0] == 'backbone.visual.layer1.0.conv1.weight'
"""

def test_without_detectron2(tmp_path):
    "The module can be imported, what needs detectron2 says how to get it, and checkpoints are converted."
    done = python('-c', WITHOUT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

# What an optimizer holds

OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop)
GROUPS = st.lists(st.lists(st.booleans(), max_size=3), min_size=1, max_size=4)
LEARNING = GROUPS.filter(lambda groups: any(map(any, groups)))

@settings(max_examples=40, deadline=None)
@given(LEARNING, st.sampled_from(OPTIMIZERS))
def test_the_optimizer_holds_what_learns(learns, kind):
    "What is frozen is gone with its state, groups and settings stay, and a new optimizer takes the state."
    def build():
        torch.manual_seed(0)
        groups = [[nn.Parameter(torch.randn(2)) for _ in group] for group in learns]
        settings = [dict(params=group, lr=.01*(i+1)) for i,group in enumerate(groups)]
        return groups,kind(settings, weight_decay=.1)
    def freeze(groups):
        for group,learn in zip(groups, learns):
            for parameter,learns_on in zip(group, learn): parameter.requires_grad_(learns_on)
    groups,optimizer = build()
    sum(p.square().sum() for group in groups for p in group).backward()
    optimizer.step()
    freeze(groups)
    assert drop_frozen(optimizer) == sum(not learn for group in learns for learn in group)
    held = [[id(p) for p in group['params']] for group in optimizer.param_groups]
    assert held == [[id(p) for p in group if p.requires_grad] for group in groups]
    assert [group['lr'] for group in optimizer.param_groups] == [.01*(i+1) for i in range(len(learns))]
    assert {id(p) for p in optimizer.state} <= {p for group in held for p in group}
    groups,again = build()
    freeze(groups)
    drop_frozen(again)
    again.load_state_dict(optimizer.state_dict())

# A trainer, in one process and in two

class Toy(nn.Module):
    "A linear map from the last features of a backbone to four numbers an image."
    def __init__(self, clip):
        super().__init__()
        self.backbone = OpenTransCLIP(clip=clip)
        self.head = nn.Linear(self.backbone.output_shape()['res5'].channels, 4)

    def forward(self, batch):
        seen = self.backbone(batch['x'])['res5'].mean((2, 3))
        return dict(mse=(self.head(seen) - batch['y']).square().mean())

def batches(start=0, rank=0):
    "Batch i is the same in every run."
    while True:
        generator = torch.Generator().manual_seed(100*start+rank)
        start += 1
        yield dict(x=torch.rand(4, 3, 32, 32, generator=generator), y=torch.rand(4, 4, generator=generator))

def small(seed=0):
    torch.manual_seed(seed)
    return Toy(tiny_backbone(seed, width=4))

def small_mask(): return SparseMask.magnitude(tiny_backbone(width=4).tower, .1)
def pruned(model, mask): return all(not w[~mask[name]].any() for name,w in mask.weights(model).items())
def learning(model): return [p for p in model.parameters() if p.requires_grad]
def sgd(model): return torch.optim.SGD(learning(model), lr=.05, momentum=.9, weight_decay=.01)

def train_part(mask, rank, folder, name, start, stop):
    "A part of a distributed run with mask and selection: (its model, its hook of the selection)."
    model = small()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    trainer,pick = SimpleTrainer(wrapped, batches(start, rank), sgd(model)),SelectionHook(2)
    checkpointer = DetectionCheckpointer(wrapped, str(folder), trainer=trainer)
    trainer.register_hooks([MaskHook(mask), pick])
    if start:
        checkpointer.load(f'{folder}/{name}.pth')
        assert trainer.iter+1 == start
    trainer.train(start, stop)
    trainer.iter = stop-1
    checkpointer.save(name)
    dist.barrier()
    assert (trainer.model is not wrapped) and trainer.model.broadcast_buffers is False
    return model,pick

def assert_processes_agree(model):
    both = [None, None]
    dist.all_gather_object(both, dict(model.named_parameters()))
    assert all(torch.equal(both[0][name], p) for name,p in both[1].items()), 'the two processes have gone apart'

def distributed(rank, port, folder):
    "One of two processes: a run, and the same one in two parts."
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    mask,ends = small_mask(),{}
    for name,start,stop in (('whole', 0, 5), ('cut', 0, 3), ('cut', 3, 5)):
        model,pick = train_part(mask, rank, folder, name, start, stop)
        assert pruned(model, mask)
        assert (pick.table is None) == bool(start)                          # a resumed run does not look again
        assert_processes_agree(model)
        ends[name] = {key: tensor.clone() for key,tensor in model.state_dict().items()},pick.selection
    (whole,chosen),(cut,again) = ends['whole'],ends['cut']
    # detectron2 saves the statistics of the first process's norms, for all
    same = dict(model.named_parameters()) if rank else whole
    assert chosen == again and all(torch.equal(whole[key], cut[key]) for key in same)
    torch.save(chosen.freeze, f'{folder}/frozen{rank}.pt')
    dist.destroy_process_group()

@needs_detectron2
def test_two_processes_choose_together_and_resume(tmp_path):
    "One choice, no wait for gradients that do not come, equal weights, and a stopped run ends as one that was not."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(distributed, (port, tmp_path), nprocs=2)
    first,second = (torch.load(tmp_path/f'frozen{rank}.pt', weights_only=True) for rank in (0, 1))
    assert first == second and len(first) > 3

class Overflow(HookBase):
    "Makes the gradients of one iteration infinite, and looks at what became of the step."
    def __init__(self, mask, scaler):
        self.mask = mask
        self.scaler = scaler
        self.scales = []

    def after_backward(self):
        head = self.trainer.model.head.weight
        self.before = head.detach().clone()
        if self.trainer.iter == 2: head.grad.fill_(torch.inf)

    def after_step(self):
        assert pruned(self.trainer.model, self.mask)
        self.scales.append(self.scaler.get_scale())
        skipped = torch.equal(self.before, self.trainer.model.head.weight)
        assert skipped == (self.trainer.iter == 2), 'the step that overflowed was not skipped, or another was'

@needs_detectron2
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision(monkeypatch):
    "AMPTrainer: a step that overflows is skipped, and the mask is in force throughout."
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model,mask = small().to(device),small_mask()
    scaler = torch.amp.GradScaler(device, init_scale=2.**8, growth_interval=2)
    data = ({name: tensor.to(device) for name,tensor in batch.items()} for batch in batches())
    trainer = AMPTrainer(model, data, torch.optim.SGD(learning(model), lr=1e-2, momentum=.9), grad_scaler=scaler)
    overflow = Overflow(mask, scaler)
    trainer.register_hooks([MaskHook(mask), SelectionHook(3), overflow])
    # the trainer asks for CUDA; scaler and autocast work without
    if device == 'cpu': monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    trainer.train(0, 5)
    assert overflow.scales[2] < overflow.scales[1]

def a_vit():
    "A toy on a small ViT, with the same weights each time."
    text = tiny_backbone().text
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=4, width=32, head_width=16, patch_size=8)
    vocabulary = len(text.tokenizer)
    words = open_clip.model.CLIPTextCfg(context_length=16, vocab_size=vocabulary, width=32, heads=2, layers=1)
    return Toy(ClipBackbone.from_model(open_clip.model.CLIP(16, vision, words), text.tokenizer, 'tiny ViT'))

def run_to(stop, folder, selection):
    "A run with a selection that goes on from the folder's last checkpoint: its model."
    model,start = a_vit(),0
    optimizer = torch.optim.AdamW(learning(model), lr=1e-2, weight_decay=.1)
    trainer = SimpleTrainer(model, None, optimizer)
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks([SelectionHook(2, selection=selection), hooks.PeriodicCheckpointer(checkpointer, 1)])
    checkpointer.resume_or_load('', resume=True)
    if checkpointer.has_checkpoint(): start = trainer.iter+1
    trainer.data_loader = batches(start)
    trainer.train(start, stop)
    return model

@needs_detectron2
def test_parts_of_a_packed_projection_are_frozen_over_a_resume(tmp_path):
    "On a ViT, q is frozen and k and v learn, by rows of one parameter; resumed, the run ends with equal weights."
    names = [layer.name for layer in layers(a_vit().backbone)]
    queries = [name for name in names if '[q]' in name]
    selection = LayerSelection([name for name in names if name not in queries], queries, 'q is frozen')
    assert len(selection.freeze) == 4
    ends = []
    for stops in ((5,), (3, 5)):
        folder = tmp_path/str(len(stops))
        folder.mkdir()
        for stop in stops: model = run_to(stop, folder, selection)
        ends.append(model.state_dict())
    whole,cut = ends
    assert all(torch.equal(tensor, cut[name]) for name,tensor in whole.items())
    early = torch.load(tmp_path/'1'/'model_0000001.pth', weights_only=True)['model']
    key = 'backbone.visual.transformer.resblocks.0.attn.in_proj_weight'
    assert torch.equal(early[key][:32], whole[key][:32]) and not torch.equal(early[key][32:], whole[key][32:])

# The public training scripts

SCRIPT = r'''
import contextlib, importlib.util, json, logging, os, sys, types, warnings
warnings.simplefilter('ignore')
kind,repo,work,iterations = *sys.argv[1:4],int(sys.argv[4])
sys.path.insert(0, repo)
os.chdir(repo)                                                      # FC-CLIP reads a file there when it is imported
import torch
def there(name): return importlib.util.find_spec(name) is not None
if not there('MultiScaleDeformableAttention'):                          # then both projects compute it with PyTorch
    sys.modules['MultiScaleDeformableAttention'] = types.ModuleType('MultiScaleDeformableAttention')
import train_net
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.projects.deeplab import add_deeplab_config
from opentrans.core import OpenTransError, layers
from opentrans.data import ShapesWorld
from opentrans.frameworks.detectron2 import (
    add_opentrans_config, image_tower, MaskHook, register_catalog, SelectionHook)
ours = kind != 'fcclip'                                                 # is the backbone ours?
if not ours:
    # it gives the text encoder (length, batch, width), and newer open_clip wants (batch, length, width)
    from fcclip.modeling.backbone.clip import CLIP
    def encode_text(self, text, normalize=False): return self.clip_model.encode_text(text, normalize=normalize)
    CLIP.encode_text = encode_text
os.chdir(work)
torch.manual_seed(0)

cfg = get_cfg()
add_deeplab_config(cfg)
train_net.add_maskformer2_config(cfg)
if ours: add_opentrans_config(cfg)                                      # the first line
else: train_net.add_fcclip_config(cfg)
file = 'maskformer2_R50_bs16_50ep.yaml' if ours else 'fcclip/fcclip_convnext_large_eval_ade20k_r50.yaml'
cfg.merge_from_file(f'{repo}/configs/coco/panoptic-segmentation/{file}')
world = ShapesWorld('train', 'crowd', n=4, size=64)
register_catalog(world, 'shapes', work)
options = {
    'MODEL.DEVICE': 'cpu', 'MODEL.WEIGHTS': '', 'MODEL.SEM_SEG_HEAD.NUM_CLASSES': len(world.vocabulary),
    'MODEL.MASK_FORMER.TRAIN_NUM_POINTS': 256, 'DATASETS.TRAIN': ('shapes',), 'DATASETS.TEST': ('shapes',),
    'INPUT.DATASET_MAPPER_NAME': 'coco_panoptic_lsj' if there('panopticapi') else 'mask_former_semantic',
    'INPUT.IMAGE_SIZE': 64, 'INPUT.MIN_SIZE_TRAIN': (64,), 'INPUT.CROP.ENABLED': False, 'DATALOADER.NUM_WORKERS': 0,
    'SOLVER.IMS_PER_BATCH': 2, 'SOLVER.MAX_ITER': iterations, 'SOLVER.CHECKPOINT_PERIOD': 1000,
    'SOLVER.AMP.ENABLED': False, 'OUTPUT_DIR': work, 'SEED': 0}
if ours: options['MODEL.BACKBONE.NAME'] = 'OpenTransCLIP'
else: options['MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS'] = ''
cfg.merge_from_list([part for option in options.items() for part in option])

class Trainer(train_net.Trainer):
    "The project's trainer, without tensorboard and without the evaluation at the end."
    def build_writers(self): return []
    @classmethod
    def test(cls, cfg, model, evaluators=None): return {}

class Watch(HookBase):
    "Remembers density, loss and the number of parameters that are held, step by step."
    def __init__(self): self.seen = []
    def after_step(self):
        loss = float(trainer.storage.latest()['total_loss'][0])
        held = sum(len(group['params']) for group in trainer.optimizer.param_groups)
        self.seen.append(dict(density=hook.density, loss=loss, held=held))

with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
    trainer = Trainer(cfg)
    logging.disable(logging.CRITICAL)
    hook,pick,watch = MaskHook('mask.safetensors', iteration=1),SelectionHook(2),Watch()
    trainer.register_hooks([hook, pick, watch] if ours else [hook, watch])           # the second line
    trainer.resume_or_load(resume=True)
    trainer.train()
out = dict(seen=watch.seen, start=trainer.start_iter, model=type(trainer.model).__name__)
if ours: out.update(train=pick.selection.train, freeze=pick.selection.freeze, looked=pick.table is not None)
else:
    pick.trainer = trainer
    try: pick.choose()
    except OpenTransError as error: out['refused'] = str(error)
names = {id(p): name for name,p in trainer.model.named_parameters()}
towers = layers(image_tower(trainer.model))
out['places'] = sorted({names[id(layer.param)][:-len(layer.key)] for layer in towers})
json.dump(out, open('out.json', 'w'))
'''

def public(kind, variable, work, iterations):
    "Run a project's own trainer in a process of its own; in one, the names that both projects register collide."
    repo = os.environ.get(variable)
    if not repo: pytest.skip(f'{variable} is not set: give the folder of the public code')
    if not importlib.util.find_spec('cv2'): pytest.skip('it needs OpenCV: pip install opencv-python-headless')
    command = [sys.executable, '-c', SCRIPT, kind, str(Path(repo).resolve()), str(work), str(iterations)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work/'out.json').read_text())

@pytest.fixture(scope='module')
def rn50_mask(): return SparseMask.magnitude(ClipBackbone.create('RN50', pretrained=None).tower, .1)

def assert_masked_from_the_second_on(seen):
    densities = [step['density'] for step in seen]
    assert densities[0] > .999 and all(abs(density-.1) < 1e-4 for density in densities[1:])

@needs_detectron2
def test_public_mask2former(rn50_mask, tmp_path):
    "The mask goes in at iteration 1, layers are frozen from 2 on, and a resumed run goes on so; on our backbone."
    rn50_mask.save(tmp_path/'mask.safetensors')
    found = public('mask2former', 'OPENTRANS_MASK2FORMER', tmp_path, 4)
    assert found['model'] == 'MaskFormer' and found['places'] == ['backbone.visual.']
    assert_masked_from_the_second_on(found['seen'])
    assert all(step['loss'] == step['loss'] for step in found['seen'])
    held = [step['held'] for step in found['seen']]
    assert held[0] == held[1] > held[2] == held[3] and held[1]-held[2] == len(found['freeze'])
    assert len(found['train']) + len(found['freeze']) == 55
    again = public('mask2former', 'OPENTRANS_MASK2FORMER', tmp_path, 5)
    assert again['start'] == 4 and not again['looked'] and again['freeze'] == found['freeze']
    assert again['seen'][0]['held'] == held[3] and abs(again['seen'][0]['density']-.1) < 1e-4

@needs_detectron2
def test_public_fcclip(rn50_mask, tmp_path):
    "The same file goes into FC-CLIP's own backbone; that one is frozen by design, so no layer can be chosen."
    rn50_mask.save(tmp_path/'mask.safetensors')
    found = public('fcclip', 'OPENTRANS_FCCLIP', tmp_path, 3)
    assert found['model'] == 'FCCLIP' and found['places'] == ['backbone.clip_model.visual.']
    assert_masked_from_the_second_on(found['seen'])
    assert 'frozen' in found['refused']
