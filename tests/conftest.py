"A real JupyterLab in a headless browser, for the tests of widgets. Skipped, with the reason, where one of them is missing."
import os, re, shutil, socket, subprocess, sys, time, urllib.request
import pytest

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.fixture
def lab(tmp_path, request):
    "A JupyterLab server on a notebook of one cell, the NOTEBOOK of the test's module; yields its address."
    pytest.importorskip('jupyterlab', reason='JupyterLab comes with opentrans[dev]')
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(request.module.NOTEBOOK)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    (tmp_path/'work').mkdir(); nbformat.write(nb, tmp_path/'work/explore.ipynb')
    port,log = free_port(),open(tmp_path/'lab.log', 'w')
    options = dict(ip='127.0.0.1', port=port, port_retries=0, root_dir=tmp_path/'work', allow_root=True)
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--IdentityProvider.token=', *[f'--ServerApp.{k}={v}' for k,v in options.items()],
                               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.news_url=None'], stdout=log, stderr=log,
                              env={**os.environ, 'JUPYTER_CONFIG_DIR': str(tmp_path/'config'), 'JUPYTERLAB_SETTINGS_DIR': str(tmp_path/'settings'),
                                   'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path/'workspaces'), 'JUPYTER_DATA_DIR': str(tmp_path/'data')})
    try:
        for _ in range(240):
            if server.poll() is not None: pytest.fail(f"JupyterLab ended: {(tmp_path/'lab.log').read_text()[-2000:]}")
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=2); break
            except OSError: time.sleep(.5)
        yield f'http://127.0.0.1:{port}/lab/tree/explore.ipynb'
    finally: server.terminate(); server.wait(20); log.close()

@pytest.fixture
def browser(tmp_path):
    chromium,driver = shutil.which('chromium') or shutil.which('google-chrome'),shutil.which('chromedriver')
    if not chromium or not driver: pytest.skip('no chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)')
    selenium = pytest.importorskip('selenium', reason='selenium drives the browser: pip install selenium')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for a in ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
              '--disable-sync', '--disable-dev-shm-usage', '--window-size=1500,1100', f'--user-data-dir={tmp_path}/chromium'): options.add_argument(a)
    b = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try: yield b
    finally: b.quit()

@pytest.fixture
def page(browser, lab, tmp_path):
    "The notebook, opened, its cell running: `find(css)` gives elements, `wait(what, why)` waits until `what()` is true."
    from types import SimpleNamespace
    from selenium.common.exceptions import ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException, TimeoutException
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    find = lambda css: browser.find_elements(By.CSS_SELECTOR, css)
    def wait(what, why): # until it is so; elements that go away meanwhile are looked for again
        try: return WebDriverWait(browser, 150, .3, (NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException, IndexError)).until(lambda _: what())
        except TimeoutException:
            browser.save_screenshot(str(tmp_path/'failed.png'))
            pytest.fail(f"{why}. The cell says: {find('.jp-Cell')[0].text[-1500:] if find('.jp-Cell') else 'nothing'}")
    browser.get(lab)
    wait(lambda: find('.jp-Notebook .jp-CodeCell .cm-content'), 'the notebook did not open')
    def run(): # JupyterLab replaces its elements while it starts: click and press again until the cell has a number or a star
        if re.search(r'\[(\*|\d+)\]', find('.jp-InputPrompt')[0].text): return True
        find('.jp-Notebook .jp-CodeCell .cm-content')[0].click()
        ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        time.sleep(2)
    wait(run, 'the cell did not run')
    return SimpleNamespace(browser=browser, find=find, wait=wait, actions=lambda: ActionChains(browser))
