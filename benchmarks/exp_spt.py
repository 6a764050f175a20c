"""SPT-LoRA and SPT-Adapter beside LoRA, adapters, bias, linear probing, random places and full fine-tuning at equal trainable share, on a small ViT and ShapesWorld, several seeds (the toy of thesis Tables 2.1 and 2.6, and Figure 2.4).

    OMP_NUM_THREADS=1 python benchmarks/exp_spt.py --tune [--seeds 5] [--out docs/results/spt-5seeds.json] [--work spt.run]

The small ViT is trained once, to name the base things of ShapesWorld. Three tasks, as VTAB has natural, specialised and structured ones:
to name the novel things (20 classes, 200 pictures), to name them by night (a fifth of the light, and noise), and to count the things of a picture (one to four, 600 pictures).
A seed draws the pictures, the head, the modules' first numbers and the order of batches. Every arm trains its head and, but for linear probing, its class token besides its budget. `--tune` tries each arm's learning rates on a seed
that is not among the others (1000) and writes the best into --work, where a run reads them. What is done lies in --work and is not done again, so that an interrupted run goes on.
"""
import argparse, functools, math, time
from datetime import date
from pathlib import Path
import numpy as np
import timm, torch
import torch.nn.functional as F
from opentrans.files import load_json, load_tensors, save_json, save_tensors
from opentrans.runtime import seeded
from opentrans.data import TRIPLES, is_novel, object_image, paint_object
from opentrans.experiments import hardware
from opentrans.heavy_tail import analyze
from opentrans.vit.peft import add_adapters, add_lora, trainable_report
from opentrans.vit.spt import add_spt, alpha_sensitivity, sensitivity_profile, sweep_allocations
from opentrans.vit.sensitivity import param_sensitivity

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
SET = dict(budget=3072, r=2, pretrain_images=4000, pretrain_steps=1500, pretrain_batch=64, pretrain_lr=2e-3, steps=150, batch=32, weight_decay=1e-4, warmup=15, train=dict(novel=200, night=200, count=600), test=400)
ARMS = ('linear', 'bias', 'lora', 'adapter', 'sparse', 'random', 'spt-lora', 'spt-adapter', 'full')
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BASE,NOVEL = ([k for k in TRIPLES if is_novel(*k) == b] for b in (False, True))

def things(kinds, n, seed):
    "Pictures of single things, classes in turn."
    rng = np.random.default_rng([seed, 2025])
    y = np.arange(n) % len(kinds)
    x = np.stack([object_image(rng, VIT['img_size'], *kinds[i]) for i in y])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float()/127.5-1,torch.from_numpy(y)

def counted(n, seed):
    "Pictures of one to four small base things on a calm ground, which do not lie on each other, and how many less one."
    rng,size = np.random.default_rng([seed, 2027]),VIT['img_size']
    y,x = np.arange(n) % 4,[]
    for k in y:
        img,at = np.clip(rng.uniform(.15, .9)+rng.uniform(-.12, .12, 3), 0, 1)*np.ones((size, size, 3)),[]
        while len(at) <= k:
            middle = rng.uniform(.15, .85, 2)*size
            if all(np.hypot(*(middle-m)) > .31*size for m in at): at.append(middle)
        for cx,cy in at: paint_object(rng, img, cx, cy, size*rng.uniform(.12, .17), rng.uniform(-.6, .6), *BASE[rng.integers(len(BASE))])
        x.append(np.clip(img, 0, 1))
    return torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float()*2-1,torch.from_numpy(y)

def at_night(x, seed):
    "A fifth of the light, and noise."
    g = torch.Generator().manual_seed(seed)
    return ((x+1)/2*.2 + .04*torch.randn(x.shape, generator=g)).clamp(0, 1)*2-1

@functools.lru_cache(maxsize=4)
def load_task(task, seed):
    "Pictures and labels to train on and to test with, and the number of classes."
    n,m = SET['train'][task],SET['test']
    if task == 'novel': return things(NOVEL, n, seed+1),things(NOVEL, m, seed+100_001),len(NOVEL)
    if task == 'night': (x,y),(tx,ty) = things(NOVEL, n, seed+1),things(NOVEL, m, seed+100_001); return (at_night(x, seed+1), y),(at_night(tx, seed+100_001), ty),len(NOVEL)
    return counted(n, seed+1),counted(m, seed+100_001),4

def new_vit(classes, seed=0):
    with seeded(seed): return timm.models.VisionTransformer(**VIT, num_classes=classes)

def fit(model, x, y, steps, batch, lr, seed, weight_decay, warmup):
    "AdamW with a cosine, over what has a gradient."
    opt,g = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay),torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(math.ceil(steps*batch/len(x)))])
    model.train()
    for i in range(steps):
        for group in opt.param_groups: group['lr'] = lr*min(1, (i+1)/max(1, warmup))*(.5+.5*math.cos(math.pi*i/steps))
        at = order[i*batch:(i+1)*batch]
        opt.zero_grad(); F.cross_entropy(model(x[at]), y[at]).backward(); opt.step()
    return model.eval()

@torch.no_grad()
def accuracy(model, x, y): return (torch.cat([model(p) for p in x.split(100)]).argmax(1) == y).float().mean().item()

@functools.lru_cache(maxsize=1)
def pretrain(work):
    "The small ViT that names base things; its accuracy on new pictures of them."
    file = work/'vit.safetensors'
    model = new_vit(len(BASE))
    if not file.exists():
        x,y = things(BASE, SET['pretrain_images'], 0); began = time.process_time()
        fit(model, x, y, SET['pretrain_steps'], SET['pretrain_batch'], SET['pretrain_lr'], 0, .05, 50)
        save_tensors(model.state_dict(), file, dict(accuracy=accuracy(model, *things(BASE, 400, 77)), seconds=time.process_time()-began))
    state,meta = load_tensors(file)
    model.load_state_dict(state)
    return model.eval(),{k: float(v) for k,v in meta.items()}

def for_task(base, classes, seed):
    "The pretrained body with a new head."
    model = new_vit(classes, seed)
    model.load_state_dict({k: v for k,v in base.state_dict().items() if not k.startswith('head.')}, strict=False)
    return model.eval()

def deal_again(sens, seed):
    "The same sensitivities at random places: among tensors of a shape, and inside them."
    g,names = torch.Generator().manual_seed(seed),list(sens)
    res = {}
    for shape in dict.fromkeys(t.shape for t in sens.values()):
        group = [n for n in names if sens[n].shape == shape]
        for n,i in zip(group, torch.randperm(len(group), generator=g).tolist()): t = sens[group[i]]; res[n] = t.flatten()[torch.randperm(t.numel(), generator=g)].view(shape)
    return {n: res[n] for n in names}

def tune_this(model, arm, x, y, seed):
    "Make ready what an arm trains."
    budget,r = SET['budget'],SET['r']
    full = lambda: [p.requires_grad_(True) for n,p in model.named_parameters() if n.startswith('head.') or n == 'cls_token' and arm != 'linear']
    if arm == 'full': return
    if arm in ('linear', 'bias'):
        for n,p in model.named_parameters(): p.requires_grad_(arm == 'bias' and n.endswith('bias'))
    elif arm == 'lora': add_lora(model, ['blocks.*.attn.qkv.weight[q]', 'blocks.*.attn.qkv.weight[v]'], r=3, seed=seed)
    elif arm == 'adapter': add_adapters(model, 'blocks.*.mlp.fc2.weight', r=5, seed=seed)
    else:
        kind = dict(sparse='none').get(arm, 'adapter' if arm == 'spt-adapter' else 'lora')
        s = param_sensitivity(model, [(x, y)], F.cross_entropy, n_samples=len(x), chunk=32)
        if arm == 'random': s = deal_again(s, seed)
        total = budget+VIT['embed_dim']                                                      # with the class token: the tau whose total is nearest, so that all arms train as much
        add_spt(model, sweep_allocations(s, [total], kind, r, taus=range(budget//4, 2*budget, 32), always=VIT['embed_dim'])[total], seed=seed)
    full()

def job(work, task, arm, seed, lr):
    "One run; what is known already is read."
    file = work/f'{task}-{arm}-{seed}-{lr:g}.json'
    if file.exists(): return load_json(file)
    base,_ = pretrain(work)
    (x,y),(tx,ty),classes = load_task(task, seed)
    model = for_task(base, classes, seed); began = time.process_time()
    tune_this(model, arm, x, y, seed)
    report = trainable_report(model)
    head = int(report['count'][report['class'] == 'head'].sum())
    fit(model, x, y, SET['steps'], SET['batch'], lr, seed, SET['weight_decay'], SET['warmup'])
    res = dict(task=task, arm=arm, seed=seed, lr=lr, accuracy=accuracy(model, tx, ty), trained=report.attrs['trained']-head, head=head, body=report.attrs['body'], chance=float(ty.bincount().max()/len(ty)), seconds=time.process_time()-began)
    save_json(res, file)
    return res

def patterns(work, seed=0):
    "Where the sensitive weights of each task are (Fig. 2.4), and how alpha and sensitivity of the layers agree."
    base,_ = pretrain(work); table = analyze(base, skip=('head',)); res = {}
    for task in SET['train']:
        (x,y),_,classes = load_task(task, seed)
        s = param_sensitivity(for_task(base, classes, seed), [(x, y)], F.cross_entropy, chunk=32)
        frame = alpha_sensitivity(table, s)
        res[task] = dict({by: sensitivity_profile(s, SET['budget'], by).to_dict('index') for by in ('block', 'operation')}, alpha=dict(frame.attrs, layers=frame.to_dict('index')))
    return res

def tune(work):
    "The learning rate of each arm and task, by a seed of its own."
    best = {}
    for task in SET['train']:
        for arm in ARMS:
            runs = [job(work, task, arm, 1000, lr) for lr in RATES]
            best.setdefault(task, {})[arm] = max(runs, key=lambda r: r['accuracy'])['lr']
            print(task, arm, [(r['lr'], round(r['accuracy'], 3)) for r in runs], flush=True)
    save_json(best, work/'rates.json')
    return best

def same_settings(work):
    "Runs of other settings are not to be mixed with these."
    now,file = dict(vit=VIT, settings=SET, rates=list(RATES)),work/'settings.json'
    if file.exists() and load_json(file) != now: raise SystemExit(f"'{work}' holds runs of other settings. Give another --work, or delete it.")
    save_json(now, file)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5); p.add_argument('--out', default='docs/results/spt-5seeds.json'); p.add_argument('--work', default='spt.run', type=Path)
    p.add_argument('--tune', action='store_true', help='look for learning rates first'); p.add_argument('--quick', action='store_true', help='tiny sizes, for a test of this file')
    args = p.parse_args()
    torch.set_num_threads(1); args.work.mkdir(parents=True, exist_ok=True)
    if args.quick: SET.update(pretrain_images=80, pretrain_steps=2, pretrain_batch=8, steps=2, batch=8, train=dict(novel=20, night=20, count=16), test=20)
    same_settings(args.work)
    _,pre = pretrain(args.work)
    rates = tune(args.work) if args.tune else load_json(args.work/'rates.json') if (args.work/'rates.json').exists() else {t: dict.fromkeys(ARMS, 3e-3) for t in SET['train']}
    results = [job(args.work, task, arm, seed, rates[task][arm]) for seed in range(args.seeds) for task in SET['train'] for arm in ARMS]
    for task in SET['train']:
        for arm in ARMS:
            a = np.array([r['accuracy'] for r in results if (r['task'], r['arm']) == (task, arm)]); one = next(r for r in results if (r['task'], r['arm']) == (task, arm))
            print(f"{task:6} {arm:12} {one['trained']:7,} ({one['trained']/one['body']:.2%})  {100*a.mean():.1f} ± {100*a.std(ddof=1) if len(a) > 1 else 0:.1f}")
    seconds = sum(r['seconds'] for r in results)+pre['seconds']
    save_json(dict(what='SPT on ShapesWorld: toy scale', run=dict(command=f"OMP_NUM_THREADS=1 python benchmarks/exp_spt.py{' --tune' if (args.work/'rates.json').exists() else ''}{' --quick' if args.quick else ''} --seeds {args.seeds}", date=str(date.today()), cpu_minutes=round(seconds/60, 1), threads=1, **hardware(), timm=timm.__version__),
                   seeds=list(range(args.seeds)), vit=VIT, settings=SET, rates=rates, pretrained=pre['accuracy'], results=results, patterns=patterns(args.work)), args.out)
