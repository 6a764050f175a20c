"Jobs in this process, in processes of this machine, and on a scheduler with workers of their own."
import dataclasses, json, multiprocessing, os, re, signal, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from opentrans import experiments as ex
from opentrans.data.batches import sample_batches
from opentrans.errors import OpenTransError
from opentrans.experiments.shared import share_job
from opentrans.pruning import SparseMask
from conftest import PATIENCE, ended, until
from forked import Forked

distributed = pytest.importorskip('distributed', reason="distributed comes with opentrans[cluster]")
ROOT = Path(__file__).resolve().parents[1]

def begin_and_wait(folder):
    "A job that says who does it, and ends when it may."
    (folder/f'begun-{os.getpid()}').touch()
    until((folder/'go').exists, 'the job may not end')
    return os.getpid()

def refuse(): raise OpenTransError('no such thing')

def end_worker(): os.kill(os.getpid(), signal.SIGKILL)

def environment():
    "That of a process which can import the package and this module."
    silent = {k: v for k,v in os.environ.items() if k not in ('OPENTRANS_PROGRESS', 'IN_TEST')}
    return dict(silent, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]), OMP_NUM_THREADS='1')

@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, each a process of its own: yields a client and the processes of the workers by
    name."""
    file = tmp_path/'scheduler.json'
    def start(name, *words):
        return Forked(['-m', 'dask', *words, '--no-dashboard', '--scheduler-file', file], environment(), tmp_path,
                      tmp_path, name)
    def start_worker(name):
        return start(name, 'worker', '--name', name, '--nthreads', '1', '--no-nanny', '--memory-limit', '0')
    processes = dict(scheduler=start('scheduler', 'scheduler', '--host', '127.0.0.1', '--port', '0',
                                     '--dashboard-address', '127.0.0.1:0'))
    try:
        until(file.exists, 'the scheduler did not begin', lambda: processes['scheduler'].said()[-2000:])
        processes |= {name: start_worker(name) for name in ('one', 'two')}
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
            yield client, processes
    finally:
        for process in processes.values():
            process.terminate()
            ended(process)

def address_of(client): return client.scheduler.address

def busy_worker(client):
    "The name of a worker that is at a job, if there is one."
    busy = [address for address,keys in client.processing().items() if keys]
    workers = client.scheduler_info(n_workers=-1)['workers'] # asked later: a worker may have come or gone between
    return next((workers[address]['name'] for address in busy if address in workers), None)

def test_a_killed_workers_job_is_run_again(tmp_path, cluster):
    "A worker is lost in the midst of a job: another does it from the beginning, and what waits for it comes after."
    client, processes = cluster
    jobs = {'after': (('first',), str, ('done',)), 'first': ((), begin_and_wait, (tmp_path,))}
    def begun(): return {int(file.name.split('-')[1]) for file in tmp_path.glob('begun-*')}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(ex.run_jobs, jobs, address_of(client))
        until(lambda: begun() or run.done(), 'no job was begun')
        killed, = begun() or run.result()
        assert killed in {processes[name].pid for name in ('one', 'two')}
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(begun()) == 2 or run.done(), 'the job was not run again')
        (tmp_path/'go').touch()
        assert run.result(PATIENCE) == {'after': 'done', 'first': (begun() - {killed}).pop()}

def test_a_study_survives_the_loss_of_a_worker(tmp_path, cluster, one_thread):
    "One of two workers is killed while it works: the study ends with the numbers of a run in this process."
    client, processes = cluster
    arms, scale = [ex.Arm('dense', tables=()), ex.Arm('distilled', 'distilled', tables=())], ex.SCALES['smoke']
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(ex.run_arms, scale, (0, 1), tmp_path/'cluster', address_of(client), arms)
        name = until(lambda: busy_worker(client) or run.done() and run.result(), 'no job was begun')
        processes[name].kill()
        there = run.result(PATIENCE)
    here = ex.run_arms(scale, (0, 1), tmp_path/'here', 'local', arms)
    for a,b in zip(there, here): assert json.dumps({**a, 'seconds': 0}) == json.dumps({**b, 'seconds': 0})
    assert processes[name].poll() is not None and len(there) == 4

def test_seeds_share_the_processes(tmp_path, one_thread):
    """Two seeds in two processes of this machine, which let a third and a fourth read their samples, give what each
    gives alone."""
    arms, scale = [ex.Arm('dense', tables=())], ex.SCALES['smoke']
    read_ahead = dataclasses.replace(scale, loaders=1)
    both = ex.run_arms(read_ahead, (0, 1), tmp_path/'both', 'processes:2', arms)
    alone = [ex.run_arms(scale, n, tmp_path/f'alone{n}', 'local', arms)[0] for n in (0, 1)]
    assert [r['miou'] for r in both] == [r['miou'] for r in alone] and both[0]['miou'] != both[1]['miou']

def read_in_two(box):
    "Tell what a loader says of processes that read samples."
    try: box.put(next(sample_batches([0, 1], [[0, 1]], workers=1)))
    except OpenTransError as error: box.put(str(error))

@pytest.mark.parametrize('daemon, told', [(False, r'\[0, 1\]'),
                                          (True, '1 processes are to read samples.*DAEMON=False')])
def test_a_daemon_is_told_that_it_may_not_begin_processes(daemon, told):
    "As a worker that somebody else has started, unless it was told otherwise."
    context = multiprocessing.get_context('fork')
    box = context.Queue()
    process = context.Process(target=read_in_two, args=(box,), daemon=daemon)
    process.start()
    assert re.match(told, str(box.get(timeout=PATIENCE)))
    process.join(PATIENCE)

def test_an_error_of_a_job_is_raised_where_it_was_asked_for():
    """What a job raises in a worker is raised here, of the same class; a job that costs its worker each time is
    given up in a sentence."""
    import dask
    with pytest.raises(OpenTransError, match='no such thing'):
        ex.run_jobs({'a': ((), refuse, ()), 'b': ((), refuse, ())}, 2)
    with dask.config.set({'distributed.scheduler.allowed-failures': 0}):
        with pytest.raises(OpenTransError, match='each time its worker was killed'):
            ex.run_jobs({'a': ((), end_worker, ())}, 2)

def test_a_scheduler_that_is_not_there_is_named():
    "In one sentence, before any folder is made."
    import dask
    with dask.config.set({'distributed.comm.timeouts.connect': '1s'}):
        with pytest.raises(OpenTransError, match='No scheduler answers at tcp://127.0.0.1:9'):
            ex.run_jobs({'a': ((), str, ())}, 'tcp://127.0.0.1:9')

SCRIPT = """
import time
from opentrans.experiments import run_jobs
if __name__ == '__main__': run_jobs({'short': ((), str, ()), 'long': ((), time.sleep, (10**6,))}, 2, 'jobs')
"""

@pytest.mark.parametrize('sent', (pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM))
def test_workers_end_with_their_parent(tmp_path, sent):
    """One at work and one that waits for work; none is left behind, by Ctrl-C, which all of them hear, or by
    SIGTERM to the parent alone."""
    (tmp_path/'jobs.py').write_text(SCRIPT)
    def hear(): signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = subprocess.Popen([sys.executable, tmp_path/'jobs.py'], env=environment(), stderr=subprocess.PIPE,
                              text=True, start_new_session=True, preexec_fn=hear)
    assert parent.stderr.readline() == 'jobs: 1 of 2 done, short\n'
    if sent == signal.SIGINT: os.killpg(parent.pid, sent)
    else: parent.terminate()
    said = parent.communicate(timeout=PATIENCE)[1]
    assert parent.returncode and said.count('KeyboardInterrupt') <= 1, (parent.returncode, said)
    def left():
        try: os.killpg(parent.pid, 0)
        except ProcessLookupError: return False
        return True
    until(lambda: not left(), 'a process was left behind')

@pytest.mark.parametrize('job, words', [(refuse, 'no such thing'), pytest.param(
    end_worker, 'One of the 2 processes .* was lost', marks=pytest.mark.slow)])
def test_a_shared_job_that_fails_ends_all_its_processes(job, words):
    "An error of one process, or its loss, is one sentence; none is left behind."
    before = {*multiprocessing.active_children()}
    with pytest.raises(OpenTransError, match=words): share_job(2, job)
    assert {*multiprocessing.active_children()} <= before

def who_writes(folder):
    "Whether this is the first of two, which write into one folder."
    from opentrans.processes import Processes
    team = Processes('cpu')
    (folder/f'{team.rank} of {team.n}').touch()
    return team.every(team.rank)

@pytest.mark.parametrize('scheduler', [pytest.param('local', marks=pytest.mark.slow), 'processes:2'])
def test_a_job_is_shared_by_two_processes(scheduler, tmp_path):
    "Here and on workers: both are of one group, and the first one's result comes back."
    jobs = {'both': ((), share_job, (2, who_writes, (tmp_path,))), 'alone': ((), os.getpid, ())}
    assert ex.run_jobs(jobs, scheduler, each=2)['both'] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0 of 2', '1 of 2']

@pytest.mark.slow
def test_arms_of_two_processes_find_the_mask_of_one(tmp_path):
    "A study whose masks, warm-ups and arms are shared by two processes: the mask is the same, and so are the files."
    arms = [arm for arm in ex.ARMS if arm.mask and arm.mask.method == 'distilled'][:1]
    for count in (1, 2):
        scale = dataclasses.replace(ex.SCALES['smoke'], processes=count)
        result, = ex.run_arms(scale, 0, tmp_path/str(count), 'local', arms)
        assert 0 <= result['miou']['base'] <= 1
    one,two = (SparseMask.load(tmp_path/f'{count}'/'distilled.safetensors') for count in (1, 2))
    assert one.iou(two) == 1
    names = [{path.name for path in (tmp_path/f'{count}').iterdir()} for count in (1, 2)]
    assert names[0] == names[1]
