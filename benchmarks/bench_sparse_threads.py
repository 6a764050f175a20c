"""Two threads beside one: CLIP's RN50 trunk with a tenth of its weights.

    python benchmarks/bench_sparse_threads.py [--out benchmarks/bench_sparse_threads.json] [--seconds 20]

wall      shortest call of one thread over shortest call of two, in turns. Says something only where two processors
          are free meanwhile: `load` is stored beside it.
division  what the division of labour allows, however busy the machine is: each thread's part of each step is run
          alone and its CPU time taken (the shortest of several). The time of one thread over the sum, over the
          steps, of the longer part. It knows nothing of waiting at the steps' ends, nor of shared memory.
"""
import argparse, json, os, time
import numpy as np
import torch
from bench_sparse import masked, processor, tower
from opentrans import sparse
from opentrans.files import save_json
from opentrans.sparse.kernels import RECORD

def parts(plan):
    "For each thread a list of steps: each an array that the engine runs."
    found = []
    for records, table in zip(plan.records, plan.tables):
        ends = [i for i, (kind, _) in enumerate(records) if kind == 'wait'] or range(len(records))
        begins = [0, *(end + 1 for end in ends)]
        lines = table[1:].reshape(-1, RECORD)
        found.append([np.ascontiguousarray(np.concatenate([[end - begin], lines[begin:end].reshape(-1)]))
                      for begin, end in zip(begins, ends)])
    return found

def cpu_times(plan, tables, rounds):
    "The shortest CPU time of each array, all of them in their order a round, so that caches are as in a run."
    best = np.full(len(tables), np.inf)
    for _ in range(rounds):
        for i, table in enumerate(tables):
            start = time.thread_time()
            plan._call(table.ctypes.data)
            best[i] = min(best[i], time.thread_time() - start)
    return best

def division(one, two, rounds=7):
    "Time of one thread over the longer parts of two."
    whole = cpu_times(one, [one.tables[0]], rounds).sum()
    first, second = (cpu_times(two, tables, rounds) for tables in parts(two))
    return dict(one_ms=whole*1e3, longer_ms=np.maximum(first, second).sum()*1e3, sum_ms=(first + second).sum()*1e3,
                division=whole/np.maximum(first, second).sum(), steps=len(first))

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', default=None)
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 512])
    parser.add_argument('--seconds', type=float, default=20)
    a = parser.parse_args()
    net, rows = tower(), []
    masked(net, 'uniform', .1)
    for size in a.sizes:
        x = torch.randn(1, 3, size, size)
        models = {n: sparse.compile(net, threads=n) for n in (1, 2)}
        for model in models.values(): model(x)
        plans = {n: next(reversed(model.sparse_regions[0].plans.values())) for n, model in models.items()}
        def call(n): return lambda: plans[n].go()
        times = sparse.in_turns({'1': call(1), '2': call(2)}, a.seconds, threads=2)
        row = dict(size=size, load=os.getloadavg()[0], wall=times['1'].min()/times['2'].min(),
                   wall_median=(times['1']/times['2']).median(), pairs=len(times))
        rows.append(row | division(plans[1], plans[2]))
        print(json.dumps(rows[-1]), flush=True)
        if a.out: save_json(dict(processor=processor(), rows=rows), a.out)

if __name__ == '__main__': main()
