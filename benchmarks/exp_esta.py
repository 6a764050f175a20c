"""ESTA at toy scale: a palette adapted in one training, against uniform sampling, SN-Net and anchors tuned one by one.

    OMP_NUM_THREADS=1 python benchmarks/exp_esta.py --seeds 5 --out docs/results/esta-5seeds.json

Three ViTs of four blocks are trained on pictures of single things (the kinds of ShapesWorld's base classes). The task: name colour and shape of things cut out of scenes of another look, from few examples.
A seed draws the task's pictures, the new heads and updates, the order of batches and the stitches. All arms take as many steps; `--tune` tries learning rates by a seed of its own (those in SCALES were chosen so). The angles between the stitches' gradients are measured at one step of the adaptation to the task,
and at the same step of a training of the same form that goes on with the source. Each job (the family, then each arm of each seed) leaves a file in --jobs; what is there is not done again."""
import argparse, itertools, json, sys, time
from datetime import date
from pathlib import Path
import numpy as np, pandas as pd, timm, torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from opentrans.files import load_json, load_tensors, save_json, save_tensors
from opentrans.runtime import seeded
from opentrans.data import COLOURS, SHAPES, TEXTURES, TRIPLES, ShapesWorld, is_novel, object_image
from opentrans.experiments import hardware
from opentrans.vit.stitching import apply_pst, pst_report, stitch_configs, stitch_table, StitchableNet
from opentrans.vit.stitch_training import gradient_angles, pareto_front, StitchSampler, StitchTrainer

SIZE = 32
SCALES = dict(toy=dict(dims=(16, 32, 64), depth=4, pretrain=1000, source=24_000, batch_source=128, lr_source=(4e-3, 3e-3, 2e-3), train=600, test=1000, iterations=500, batch=32, warmup=125, ranks=(8, 4, 4), lr=2e-2, lr_full=3e-3, intervals=8, angles_at=250),
              tiny=dict(dims=(16, 32), depth=2, pretrain=3, source=64, batch_source=16, lr_source=(4e-3, 3e-3), train=40, test=40, iterations=6, batch=8, warmup=3, ranks=(2, 2), lr=4e-3, lr_full=5e-4, intervals=3, angles_at=3))
RATES = dict(lr=(5e-3, 1e-2, 2e-2), lr_full=(1e-3, 3e-3)) # tried by --tune
BASE = [t for t in TRIPLES if not is_novel(*t)]


def tower(d, depth, classes):
    "A ViT of 16 patches, their mean as the result, and strided convolutions as embedding: it learns faster than one of 8x8 patches and a class token."
    t = timm.models.VisionTransformer(img_size=SIZE, patch_size=8, embed_dim=d, depth=depth, num_heads=d//16, num_classes=classes, global_pool='avg', class_token=False)
    conv = lambda a, b: [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    t.patch_embed.proj = nn.Sequential(*conv(3, 16), *conv(16, 32), nn.Conv2d(32, d, 3, 2, 1))
    return t
def normal(images): return (torch.as_tensor(np.stack(images)).float()/255 - .45)/.25


def objects(n, seed):
    "Pictures of single things: (images, kind)."
    rng = np.random.default_rng([seed, 77])
    y = rng.integers(len(BASE), size=n)
    return normal([object_image(rng, SIZE, *BASE[k]).transpose(2, 0, 1) for k in y]), torch.as_tensor(y)


def crops(n, seed, skip=0, domain='sketch'):
    "Things cut out of crowded scenes: (images, colour and shape)."
    world,images,labels,i = ShapesWorld('val', domain, n=100_000, size=80, seed=1000+seed),[],[],skip
    colours,shapes = list(COLOURS),list(SHAPES.values() if domain == 'sketch' else SHAPES)
    while len(images) < n:
        p = world._make(i); i += 1
        for s in np.flatnonzero(p['isthing'] & p['isregion']):
            yy,xx = np.nonzero(p['segments'] == s)
            r = max(np.ptp(yy), np.ptp(xx))/2 + 2; cy,cx = (yy.max()+yy.min())/2,(xx.max()+xx.min())/2
            y0,y1,x0,x1 = (int(np.clip(v, 0, 80)) for v in (cy-r, cy+r+1, cx-r, cx+r+1))
            cut = p['image'][:, y0:y1, x0:x1][None].float()
            images.append(F.interpolate(cut, (SIZE, SIZE), mode='bilinear', align_corners=False)[0].numpy())
            colour,shape = world.vocabulary.names[p['classes'][s]].split(' ', 1)
            labels.append(colours.index(colour)*len(shapes) + shapes.index(shape))
    return normal(images[:n]), torch.as_tensor(labels[:n])


def batches(x, y, n, size, seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        i = torch.randint(len(x), (size,), generator=g); yield x[i], y[i]


@torch.no_grad()
def accuracy(f, x, y): return sum((f(a).argmax(1) == b).float().sum().item() for a,b in zip(x.split(500), y.split(500)))/len(x)


def cosine(opt, n): return torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]['lr'], total_steps=n, pct_start=.1)


def train(net, params, data, lr, n, size, seed):
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=.01); schedule = cosine(opt, n)
    for x,y in batches(*data, n, size, seed): opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step(); schedule.step()
    return net


def pretrain(c, path):
    "The family of anchors, trained once on single things."
    (x, y),test,said = objects(c['source'], 0),objects(500, 1),{}
    tensors = {}
    for i,d in enumerate(c['dims']):
        with seeded(i): net = tower(d, c['depth'], len(BASE)); train(net, net.parameters(), (x, y), c['lr_source'][i], c['pretrain'], c['batch_source'], i)
        said[str(d)] = accuracy(net.eval(), *test); tensors |= {f'{i}.{n}': p for n,p in net.state_dict().items()}
    save_tensors(tensors, path, dict(accuracy=said, scale=c))
    return said


def family(c, path):
    weights,_ = load_tensors(path); towers = []
    for i,d in enumerate(c['dims']):
        t = tower(d, c['depth'], len(BASE)); t.load_state_dict({n.split('.', 1)[1]: p for n,p in weights.items() if n.startswith(f'{i}.')}); towers.append(t.eval())
    return towers


def trainer(c, net, seed, sampling, full=False):
    "What trains a family, and the costs of its networks."
    table = stitch_table(net, (3, SIZE, SIZE))
    sampler = StitchSampler(table.flops, c['intervals'], warmup=c['warmup'] if sampling == 'importance' else float('inf'), seed=seed)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=c['lr_full' if full else 'lr'], weight_decay=.01)
    return StitchTrainer(net, sampler, opt, schedule=cosine(opt, c['iterations'])),table


def pairwise(net, data):
    "Angles, pair by pair, between gradients of the stitches of the two small anchors on the weights of query, key and value (Fig. 3.2)."
    joins = [s for s,k in enumerate(net.configs) if not k.is_anchor and k.front == 0]
    names = [n for n,_ in net.named_parameters() if n.endswith('.weight') and '.qkv.' in n]
    a = gradient_angles(net, (data[0][:100], data[1][:100]), joins, names)
    return a[tuple(torch.triu_indices(*a.shape, offset=1))].numpy().round(1).tolist()


def palette(c, path, seed, sampling, full=False):
    "One training of all stitches; what each reaches, what its score is, which are deployed."
    data,test = crops(c['train'], seed),crops(c['test'], seed, skip=50_000)
    towers = family(c, path)
    with seeded(seed):
        net = StitchableNet(towers); net.init_stitches(data[0][:100])
        for t in towers: t.reset_classifier(len(COLOURS)*len(SHAPES))
        if not full: apply_pst(net, c['ranks'][:len(towers)])
    run,table = trainer(c, net, seed, sampling, full)
    steps = batches(*data, c['iterations'], c['batch'], seed)
    history = [run.fit(itertools.islice(steps, c['angles_at']))]
    angles = None if full or sampling == 'uniform' else pairwise(net, data)
    history = pd.concat(history + [run.fit(steps)])
    sampler,learned = run.sampler,int(sum(p.numel() for p in net.parameters() if p.requires_grad))
    value = [accuracy(lambda x: net(x, s), *test) for s in table.index]
    return dict(value=value, flops=table.flops.tolist(), params=table.params.tolist(), names=table.name.tolist(), score=sampler.tracker.scores.tolist(), drawn=sampler.tracker.counts.tolist(), deployed=sampler.deploy(),
                intervals=[m.tolist() for m in sampler.intervals], spread=history.spread.round(4).tolist()[::10], trained=learned, angles=angles)


def source_angles(c, path, seed):
    "The same training on the source, up to the step at which angles are measured."
    data = objects(c['train'], 100+seed)
    with seeded(seed): net = StitchableNet(family(c, path)); net.init_stitches(data[0][:100]); apply_pst(net, c['ranks'][:len(c['dims'])])
    trainer(c, net, seed, 'importance')[0].fit(itertools.islice(batches(*data, c['iterations'], c['batch'], seed), c['angles_at']))
    return dict(angles=pairwise(net, data))


def single(c, path, seed, i):
    "One anchor, tuned alone with the same low-rank updates."
    data,test = crops(c['train'], seed),crops(c['test'], seed, skip=50_000)
    t = family(c, path)[i]
    with seeded(seed): t.reset_classifier(len(COLOURS)*len(SHAPES)); net = apply_pst(StitchableNet([t], stitch_configs([c['depth']])), c['ranks'][i])
    params = [p for p in net.parameters() if p.requires_grad]
    train(net, params, data, c['lr'], c['iterations'], c['batch'], seed)
    return dict(value=accuracy(net, *test), flops=int(stitch_table(net, (3, SIZE, SIZE)).flops[0]), trained=int(sum(p.numel() for p in params)))


def tune(c, path):
    "Learning rates by a seed that is not among the others, with 300 steps: accuracy over all stitches under uniform sampling, and of the anchors alone."
    c = c | dict(iterations=min(300, c['iterations']))
    for k,rates in RATES.items():
        for lr in rates:
            t = c | {k: lr}
            said = f"{np.mean(palette(t, path, 1000, 'uniform', k == 'lr_full')['value']):.3f}"
            if k == 'lr': said += '; anchors alone ' + ', '.join(f"{single(t, path, 1000, i)['value']:.3f}" for i in range(len(c['dims'])))
            print(k, lr, said, flush=True)


def arms(c): return {'esta': lambda p, s: palette(c, p, s, 'importance'), 'uniform': lambda p, s: palette(c, p, s, 'uniform'), 'snnet': lambda p, s: palette(c, p, s, 'uniform', full=True),
                     'source': lambda p, s: source_angles(c, p, s), **{f'anchor {i}': (lambda p, s, i=i: single(c, p, s, i)) for i in range(len(c['dims']))}}


def summary(r):
    "What the runs say, by seed; then mean and standard deviation."
    e,u,f = r['esta'],r['uniform'],r['snnet']
    v = {k: np.array(d['value']) for k,d in (('esta', e), ('uniform', u), ('snnet', f))}
    best = lambda d, x: float(np.mean([x[m].max() for m in d['intervals']]))
    front = pareto_front(e['flops'], v['esta'])
    res = {'ESTA, deployed by score': v['esta'][e['deployed']].mean(), 'ESTA, all': v['esta'].mean(), 'ESTA, best of each interval': best(e, v['esta']),
           'uniform, deployed by score': v['uniform'][u['deployed']].mean(), 'uniform, all': v['uniform'].mean(), 'uniform, best of each interval': best(u, v['uniform']),
           'SN-Net, all': v['snnet'].mean(), 'SN-Net, best of each interval': best(f, v['snnet']),
           'share of the deployed on the Pareto front': front[e['deployed']].mean(), 'rank correlation of score and accuracy': spearmanr(e['score'], v['esta']).statistic,
           'gradient angle, source': np.mean(r['source']['angles']), 'gradient angle, task': np.mean(e['angles']),
           'angles above 90 degrees, source': np.mean(np.array(r['source']['angles']) > 90), 'angles above 90 degrees, task': np.mean(np.array(e['angles']) > 90)}
    for i in range(sum(k.startswith('anchor') for k in r)):
        res |= {f'anchor {i} alone': r[f'anchor {i}']['value'], f'anchor {i} in ESTA': v['esta'][i], f'deployed in the interval of anchor {i}': next(v['esta'][d] for d,m in zip(e['deployed'], e['intervals']) if i in m)}
    return {k: float(x) for k,x in res.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=5); p.add_argument('--out', default='esta.json'); p.add_argument('--jobs', default='build/esta'); p.add_argument('--scale', choices=SCALES, default='toy'); p.add_argument('--tune', action='store_true', help='only try learning rates')
    a = p.parse_args(argv)
    c,jobs,began = SCALES[a.scale],Path(a.jobs)/a.scale,time.process_time()
    if (jobs/'scale.json').exists() and load_json(jobs/'scale.json') != {k: list(v) if isinstance(v, tuple) else v for k,v in c.items()}: sys.exit(f"'{jobs}' holds runs of other sizes: remove it, or choose another --jobs.")
    save_json(c, jobs/'scale.json')
    weights = jobs/'family.safetensors'
    if not weights.exists(): pretrain(c, weights)
    if a.tune: return tune(c, weights)
    results = {}
    for seed in range(a.seeds):
        for name,f in arms(c).items():
            done = jobs/f"{name.replace(' ', '')}-{seed}.json"
            if not done.exists(): t = time.process_time(); save_json(f(weights, seed) | dict(seconds=round(time.process_time()-t, 1)), done); print(done.name, flush=True)
            results.setdefault(str(seed), {})[name] = load_json(done)
    rows = {s: summary(r) for s,r in results.items()}
    many = {k: [rows[s][k] for s in rows] for k in next(iter(rows.values()))}
    said = json.loads(load_tensors(weights)[1]['accuracy'])
    save_json(dict(what='ESTA at toy scale', run=dict(command='python benchmarks/exp_esta.py ' + ' '.join(argv if argv is not None else sys.argv[1:]), date=str(date.today()), threads=torch.get_num_threads(), cpu_minutes_of_arms=round(sum(d['seconds'] for r in results.values() for d in r.values())/60, 1),
              timm=timm.__version__, **hardware()), seeds=list(range(a.seeds)), scale=c, source_accuracy=said, chance=dict(source=1/len(BASE), task=1/(len(COLOURS)*len(SHAPES))),
              summary={k: dict(mean=float(np.mean(v)), std=float(np.std(v, ddof=1)) if len(v) > 1 else None, values=v) for k,v in many.items()}, results=results), a.out)
    for k,v in many.items(): print(f'{k:45} {np.mean(v):.3f}' + (f' +- {np.std(v, ddof=1):.3f}' if len(v) > 1 else ''))


if __name__ == '__main__': torch.set_num_threads(1); main()
