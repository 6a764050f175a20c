"""SPViT searched by distillation, against pruned heads and random architectures of equal cost, on a small CLIP ViT and ShapesWorld, several seeds (the toy of thesis Tables 4.5 and 4.7).

    OMP_NUM_THREADS=1 python benchmarks/exp_spvit.py [--seeds 5] [--out docs/results/spvit-5seeds.json] [--work .spvit-runs]

The small ViT is trained once (from `shapes-rn`, which gives the targets and the text side); it is the pretrained CLIP of every seed. A seed draws the scenes, the batches, the gates and the random architectures.
Each arm has as many steps of distillation against the dense ViT: a search and a fine-tuning, or for random architectures a fine-tuning that is as long as both. The cost of the searched hybrids sets the cost of those that they are compared with.
What is done lies in --work and is not done again, so that an interrupted run goes on.
"""
import argparse, json, math, sys, time
from datetime import date
from pathlib import Path
import torch
import torch.nn.functional as F
from opentrans.clip import ASSETS, ClipBackbone, small_clip, small_config
from opentrans.files import load_json, load_tensors, save_json, save_tensors
from opentrans.data import ShapesWorld
from opentrans.experiments import hardware
from opentrans.vit.hybrids import convert_to_spvit, HybridSpec, slim_spvit, SPViTCost
from opentrans.vit.search import attention_maps, embedding_loss, fit_heads, locality, random_spec, train_spvit

VIT = dict(image_size=80, patch_size=10, width=64, head_width=16, layers=8)
SET = dict(size=80, pretrain_scenes=1000, pretrain_steps=1000, pretrain_batch=16, pretrain_lr=2e-3, train=256, val=120, batch=8, search=60, finetune=60, lr=1e-3, gate_lr=.15, temperature=1., pull=1000., attention=.75, joint=.4)
ARMS = { # name: (search or draw, operations, units, heads, share of the dense cost or the arm whose cost is met)
    'SPViT, attention only': ('search', ('skip', 'conv1', 'conv3', 'msa'), False, False, SET['attention']),
    'random operations': ('draw', ('skip', 'conv1', 'conv3', 'msa'), False, False, 'SPViT, attention only'),
    'heads by gates': ('search', ('msa',), False, True, 'SPViT, attention only'),
    'random heads': ('draw', ('msa',), False, True, 'SPViT, attention only'),
    'SPViT': ('search', ('skip', 'conv1', 'conv3', 'msa'), True, False, SET['joint']),
    'random architecture': ('draw', ('skip', 'conv1', 'conv3', 'msa'), True, False, 'SPViT'),
}

def new_vit():
    "A CLIP of the small world with a ViT for its image tower, and the text side of shapes-rn."
    cfg = dict(small_config('shapes-rn'), vision_cfg=VIT)
    model,tok = small_clip(cfg, seed=0)
    rn = {k: v.float() for k,v in load_tensors(ASSETS/'shapes-rn.safetensors')[0].items() if not k.startswith('visual.')}
    left = model.load_state_dict(rn, strict=False)
    assert not left.unexpected_keys and all(k.startswith('visual.') or 'attn_mask' in k for k in left.missing_keys), left
    return ClipBackbone.from_model(model, tok, 'shapes-vit', pretrained='shapes-vit')

def load_scenes(data): return torch.stack([data[i]['image'] for i in range(len(data))]),[data[i]['regions'] for i in range(len(data))],[data[i]['region_classes'] for i in range(len(data))]

def embed(m, images):
    "The embedding of every cell, (B, D, h, w), not of unit length."
    return m.kind.dense(m.visual, m.kind.features(m.visual, m.prepare(images))[1])

def pool(cells, regions):
    "Embeddings of regions: the mean of their cells, by the share that a region has in each."
    return F.normalize(torch.cat([F.adaptive_avg_pool2d(r[:, None].float(), c.shape[-2:]).flatten(1) @ F.normalize(c, dim=0).flatten(1).T for c,r in zip(cells, regions)]), dim=1)

def pretrain(work):
    "The small ViT: region embeddings of shapes-rn (crops) and their names."
    file = work/'teacher.safetensors'
    vit = new_vit()
    if not file.exists():
        rn,data = ClipBackbone.create('shapes-rn', pretrained='shapes-rn'),ShapesWorld('train', n=SET['pretrain_scenes'], size=SET['size'], seed=1000)
        images,regions,classes = load_scenes(data); text = rn.encode_text(data.vocabulary)
        with torch.no_grad(): r = [rn.region_embeddings(images[i:i+1], regions[i:i+1], mode='crop') for i in range(len(images))]
        opt = torch.optim.AdamW(vit.visual.parameters(), lr=SET['pretrain_lr'], weight_decay=.05); g = torch.Generator().manual_seed(0); began,steps = time.process_time(),SET['pretrain_steps']
        for i in range(steps):
            for group in opt.param_groups: group['lr'] = SET['pretrain_lr']*min(1, (i+1)/50)*(.5+.5*math.cos(math.pi*i/steps))
            b = torch.randint(len(images), (SET['pretrain_batch'],), generator=g).tolist()
            flip = torch.rand((), generator=g) < .5
            x,m = images[b],[regions[j] for j in b]
            if flip: x,m = x.flip(-1),[t.flip(-1) for t in m]
            v = pool(embed(vit, x), m)
            loss = 1 - (v*torch.cat([r[j] for j in b])).sum(1).mean() + .5*F.cross_entropy(20*v @ text.T, torch.cat([classes[j] for j in b]))
            opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(vit.visual.parameters(), 1.); opt.step()
            if i % 100 == 99: print('pretrain', i+1, round(loss.item(), 3), round(time.process_time()-began, 1), 's', flush=True)
        save_tensors(vit.visual.state_dict(), file)
    vit.visual.load_state_dict(load_tensors(file)[0])
    return vit.requires_grad_(False).eval()

@torch.no_grad()
def score(model, teacher, world):
    "Likeness to the dense tower, and zero-shot accuracy on regions."
    images,regions,classes,text,groups = world['val']; cos,right = [],[]
    for i in range(0, len(images), 20):
        s = slice(i, i+20)
        e = embed(model, images[s])
        cos.append(F.cosine_similarity(e, embed(teacher, images[s]), dim=1).mean((1, 2)))
        right.append((pool(e, regions[s]) @ text.T).argmax(1) == torch.cat(classes[s]))
    right,c = torch.cat(right).float(),torch.cat(classes)
    return dict(cosine=torch.cat(cos).mean().item(), accuracy=right.mean().item(), **{g: right[torch.isin(c, torch.tensor(groups[g]))].mean().item() for g in ('base', 'novel')})

def open_world(seed, teacher):
    images = load_scenes(ShapesWorld('train', n=SET['train'], size=SET['size'], seed=seed))[0]
    val = ShapesWorld('val', n=SET['val'], size=SET['size'], seed=seed)
    with torch.no_grad(): targets = torch.cat([embed(teacher, x) for x in images.split(32)])
    return dict(train=images, targets=targets, val=(*load_scenes(val), teacher.encode_text(val.vocabulary), val.groups))

def run_arm(name, teacher, world, seed, work):
    "One arm of one seed; its result is kept."
    file = work/f"{seed}-{''.join(c if c.isalnum() else '-' for c in name)}.json"
    if file.exists(): return load_json(file)
    how,ops,units,heads,target = ARMS[name]
    count = SPViTCost(teacher); dense = count.target
    count.target = target*dense if isinstance(target, float) else run_arm(target, teacher, world, seed, work)['gflops']
    count.weight = SET['pull']/(10*dense)**2
    loss = embedding_loss(teacher, lambda m, i: world['targets'][i] if m is teacher else embed(m, world['train'][i]))
    batch = lambda step: torch.randint(SET['train'], (SET['batch'],), generator=torch.Generator().manual_seed(seed*100_003+step))
    began,steps,history = time.process_time(),SET['finetune'],None
    if how == 'search':
        model = convert_to_spvit(teacher, ops, temperature=SET['temperature'], units=units, heads=heads).requires_grad_(True)
        history = train_spvit(model, batch, SET['search'], loss, count, lr=SET['lr'], gate_lr=SET['gate_lr'], seed=seed, clip_grad=1.)
        if heads: fit_heads(model, count)
        spec,model = HybridSpec.of(model, name),slim_spvit(model)
    else:
        spec = random_spec(teacher, count, ops, units, heads, seed=seed, tolerance=.03, temperature=SET['temperature']); steps += SET['search']
        model = spec.build(teacher).requires_grad_(True)
    tuned = train_spvit(model, lambda i: batch(i+1000), steps, loss, lr=SET['lr'], cosine=True, seed=seed, clip_grad=1.)
    res = dict(arm=name, seed=seed, gflops=count.flops(model).item()/1e9, share=count.flops(model).item()/1e9/dense, params=sum(p.numel() for p in model.visual.parameters()), ops=spec.ops, widths=spec.widths,
               heads=spec.heads, **score(model, teacher, world), loss_last=tuned.task[-10:].mean(), history=None if history is None else {k: history[k].round(6).tolist() for k in history}, seconds=time.process_time()-began)
    save_json(res, file); print(seed, name, {k: round(res[k], 4) for k in ('share', 'cosine', 'accuracy', 'novel', 'seconds')}, spec, flush=True)
    return res

def look(teacher, images):
    "Where the teacher's heads look: locality of all, and the maps of the middle patch."
    maps = attention_maps(teacher, images[:100], run=lambda x: teacher(x)); grid = (SET['size']//VIT['patch_size'],)*2
    q = 1 + grid[0]//2*grid[1] + grid[1]//2
    return dict(grid=grid, locality=locality(maps, grid).round(5).to_dict('list'), middle={n: a[:, q].double().numpy().round(5).tolist() for n,a in maps.items()})

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seeds', type=int, default=5); p.add_argument('--out', default='docs/results/spvit-5seeds.json'); p.add_argument('--work', default='.spvit-runs')
    a = p.parse_args(); work = Path(a.work); work.mkdir(parents=True, exist_ok=True)
    kept = work/'settings.json'; now = json.loads(json.dumps(dict(vit=VIT, set=SET, arms=ARMS)))
    if kept.exists() and load_json(kept) != now: sys.exit(f"'{work}' holds runs of other settings. Choose another folder, or remove it.")
    save_json(now, kept); began = time.process_time()
    teacher,results,dense = pretrain(work),[],[]
    for seed in range(a.seeds):
        world = open_world(seed, teacher); dense.append(dict(arm='dense', seed=seed, share=1., **score(teacher, teacher, world)))
        results += [run_arm(n, teacher, world, seed, work) for n in ARMS]
        if seed == 0: seen = look(teacher, world['val'][0])
    count = SPViTCost(teacher)
    save_json(dict(what='SPViT by distillation on the small world: toy scale', run=dict(command=f'python benchmarks/exp_spvit.py --seeds {a.seeds}', date=str(date.today()), cpu_minutes=round((time.process_time()-began)/60, 1), **hardware()),
                   seeds=list(range(a.seeds)), settings=now, chance=1/len(ShapesWorld('val', n=1).vocabulary), dense_gflops=count.target, dense_params=sum(p.numel() for p in teacher.visual.parameters()),
                   depth=VIT['layers'], hidden=4*VIT['width'], results=dense+results, attention=seen), a.out)
