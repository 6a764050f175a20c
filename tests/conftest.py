"""What several modules of tests need: a real JupyterLab in a headless browser, clones of public code, scripts of
benchmarks/. Skipped, with the reason, where one of them is missing."""
import gc, importlib, importlib.util, os, re, shutil, socket, subprocess, sys, time, types, urllib.request
from pathlib import Path
import pytest
from hypothesis import HealthCheck, settings

# seconds until something that is waited for counts as missing; nothing is ever judged by how long it took
PATIENCE = 900

settings.register_profile('patient', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('patient')

# what nearly all tests need
IMPORTED = ['accelerate', 'transformers', 'open_clip', 'opentrans.cli.training', 'opentrans.experiments.studies',
            'opentrans.frameworks.deeplabv3', 'opentrans.training']

def pytest_sessionstart():
    """A worker of pytest imports first what nearly all tests need, and keeps the collector of garbage away from it:
    with it a collection takes a third of a second, and tests of memory and cost ask for hundreds."""
    if 'PYTEST_XDIST_WORKER' not in os.environ: return
    for name in IMPORTED: importlib.import_module(name)
    gc.collect()
    gc.freeze()

def train_on_small_crops(monkeypatch, side):
    "The paper's recipes with crops of so many pixels; those of 512 take some hundred times as long."
    from opentrans.training import Recipe
    paper = Recipe.paper
    monkeypatch.setattr(Recipe, 'paper', lambda name: paper(name).replace(crop=side))

def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes; runs where OPENTRANS_SLOW=1')

def pytest_collection_modifyitems(items):
    "The slow tier is for those who ask for it."
    if os.environ.get('OPENTRANS_SLOW') == '1': return
    for item in items:
        if item.get_closest_marker('slow'):
            item.add_marker(pytest.mark.skip(reason='takes minutes; OPENTRANS_SLOW=1 runs it'))

@pytest.fixture(scope='module')
def one_thread():
    "Small models are fastest on one thread, above all on a busy machine."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='session')
def script():
    "Imports a script of benchmarks/ by name."
    def load(name):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent/'benchmarks'/f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load

@pytest.fixture(scope='module')
def clone():
    """Of a clone with the package `mask2former`, whose folder an environment variable names: a function that
    imports modules under mask2former.modeling, without what they import beside (data sets, Swin). They are gone
    after the test's module."""
    before = set(sys.modules)
    registries = []
    def open_clone(variable, repository):
        folder = os.environ.get(variable, '')
        if not os.path.isdir(os.path.join(folder, 'mask2former')):
            pytest.skip(f'{variable} does not name a folder with a clone of {repository}')
        modeling = pytest.importorskip('detectron2.modeling', reason='detectron2 is not installed')
        heads = modeling.SEM_SEG_HEADS_REGISTRY
        registries.append((heads, dict(heads._obj_map)))
        for name in ('mask2former', 'mask2former.modeling'):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [os.path.join(folder, *name.split('.'))]
        # the compiled operator, and one that is only imported, for colours
        for name in ('MultiScaleDeformableAttention', 'cv2'):
            if importlib.util.find_spec(name) is None: sys.modules[name] = types.ModuleType(name)
        return lambda name: importlib.import_module(f'mask2former.modeling.{name}')
    yield open_clone
    for n in set(sys.modules) - before:
        if n.split('.')[0] in ('mask2former', 'MultiScaleDeformableAttention', 'cv2'): del sys.modules[n]
    for heads,registered in registries: # the next clone registers its heads by the same names
        heads._obj_map.clear()
        heads._obj_map.update(registered)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def until(what, why, said=str):
    """Ask again and again until `what()` is true, and return it; fails, with what `said()` tells, when patience is
    at its end."""
    began = time.monotonic()
    while not (found := what()):
        if time.monotonic()-began > PATIENCE: pytest.fail(f'{why} within {PATIENCE} s. {said()}')
        time.sleep(.05)
    return found

def ended(process):
    "Wait for the end of a process that was asked to end; one that does not is killed."
    try: process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

@pytest.fixture
def lab(tmp_path, request):
    "A JupyterLab server on a notebook of one cell, the NOTEBOOK of the test's module; yields its address."
    pytest.importorskip('jupyterlab', reason='JupyterLab comes with opentrans[dev]')
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(request.module.NOTEBOOK)],
                                  metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                language='python')))
    (tmp_path/'work').mkdir()
    nbformat.write(nb, tmp_path/'work/explore.ipynb')
    port,log = free_port(),open(tmp_path/'lab.log', 'w')
    options = dict(ip='127.0.0.1', port=port, port_retries=0, root_dir=tmp_path/'work', allow_root=True)
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--IdentityProvider.token=',
                               *[f'--ServerApp.{k}={v}' for k,v in options.items()],
                               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
                               '--LabApp.news_url=None'], stdout=log, stderr=log,
                              env={**os.environ, 'JUPYTER_CONFIG_DIR': str(tmp_path/'config'),
                                   'JUPYTERLAB_SETTINGS_DIR': str(tmp_path/'settings'),
                                   'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path/'workspaces'),
                                   'JUPYTER_DATA_DIR': str(tmp_path/'data')})
    def said(): return (tmp_path/'lab.log').read_text()[-2000:]
    def answers():
        if server.poll() is not None: pytest.fail(f'JupyterLab ended: {said()}')
        try: return urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=PATIENCE)
        except OSError: return None
    try:
        until(answers, 'JupyterLab did not answer', said).close()
        yield f'http://127.0.0.1:{port}/lab/tree/explore.ipynb'
    finally:
        server.terminate()
        ended(server)
        log.close()

@pytest.fixture
def browser(tmp_path):
    chromium,driver = shutil.which('chromium') or shutil.which('google-chrome'),shutil.which('chromedriver')
    if not chromium or not driver:
        pytest.skip(
            'no chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)')
    pytest.importorskip('selenium', reason='selenium drives the browser: pip install selenium')
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for a in ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
              '--disable-background-networking', '--disable-component-update', '--disable-sync',
              '--disable-dev-shm-usage', '--window-size=1500,1100', f'--user-data-dir={tmp_path}/chromium'):
        options.add_argument(a)
    def started():
        try: return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        # the driver gives a browser one minute, which may be too little on a busy machine
        except WebDriverException: return None
    b = until(started, 'no browser started')
    b.set_page_load_timeout(PATIENCE)
    b.set_script_timeout(PATIENCE)
    try: yield b
    finally: b.quit()

@pytest.fixture
def page(browser, lab, tmp_path):
    """The notebook, opened, its cell running: `find(css)` gives elements, `wait(what, why)` waits until `what()` is
    true."""
    from types import SimpleNamespace
    from selenium.common.exceptions import (ElementNotInteractableException, NoSuchElementException,
                                            StaleElementReferenceException, TimeoutException)
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    def find(css): return browser.find_elements(By.CSS_SELECTOR, css)
    def wait(what, why): # until it is so; elements that go away meanwhile are looked for again
        try:
            return WebDriverWait(browser, PATIENCE, .3,
                                 (NoSuchElementException, StaleElementReferenceException,
                                  ElementNotInteractableException, IndexError)).until(lambda _: what())
        except TimeoutException:
            browser.save_screenshot(str(tmp_path/'failed.png'))
            pytest.fail(
                f"{why}. The cell says: {find('.jp-Cell')[0].text[-1500:] if find('.jp-Cell') else 'nothing'}")
    browser.get(lab)
    wait(lambda: find('.jp-Notebook .jp-CodeCell .cm-content'), 'the notebook did not open')
    # until then JupyterLab replaces its elements
    wait(lambda: find('.jp-NotebookPanel-toolbar [data-status="idle"]'), 'the kernel did not start')
    def runs(): return re.search(r'\[(\*|\d+)\]', find('.jp-InputPrompt')[0].text)
    # on a busy machine a click or a key may come while JupyterLab replaces its elements, and be lost: it is given
    # again until the cell runs
    def pressed():
        if runs(): return True
        find('.jp-Notebook .jp-CodeCell .cm-content')[0].click()
        if find('.jp-Notebook .jp-CodeCell .jp-Editor.jp-mod-focused'):
            ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        return runs()
    wait(pressed, 'the cell did not run')
    return SimpleNamespace(browser=browser, find=find, wait=wait, actions=lambda: ActionChains(browser))

def reference_head(reference, channels, layers):
    """The two decoders of public code (`reference.pixel`, `reference.decoder`) at the published sizes, with 255
    classes, for maps of the strides 4 to 32."""
    from detectron2.layers import ShapeSpec
    from torch import nn
    shapes = {name: ShapeSpec(channels=count, stride=stride)
              for (name,count),stride in zip(channels.items(), (4, 8, 16, 32))}
    pixel = reference.pixel(
        shapes, transformer_dropout=0., transformer_nheads=8, transformer_dim_feedforward=1024,
        transformer_enc_layers=6, conv_dim=256, mask_dim=256, norm='GN',
        transformer_in_features=['res3', 'res4', 'res5'], common_stride=4)
    masker = reference.decoder(
        256, True, num_classes=255, hidden_dim=256, num_queries=100, nheads=8, dim_feedforward=2048,
        dec_layers=layers, pre_norm=False, mask_dim=256, enforce_input_project=False)
    return nn.ModuleDict(dict(pixel_decoder=pixel, predictor=masker)).eval()
