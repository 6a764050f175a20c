"The playground in a real JupyterLab."

NOTEBOOK = """from opentrans.clip import ClipBackbone
from opentrans.runtime import seeded
from opentrans.frameworks import build
from opentrans.playground import playground
clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
with seeded(0): seg = build('deeplabv3', clip, vocabulary=['grass', 'sand', 'brick', 'water'], preset='small')
playground(seg)"""


def test_the_playground_in_jupyterlab(page, tmp_path):
    """Open the notebook, run it, type other names, choose another scene, move the slider, upload a picture: the
    plot changes each time."""
    from PIL import Image
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select
    find,wait = page.find,page.wait
    wait(lambda: find('.jp-OutputArea img.widget-image') and find('.jp-OutputArea textarea')
         and find('.jp-OutputArea .noUi-handle'), 'the widget did not appear')
    def image(): return find('.jp-OutputArea img.widget-image')[0]
    def source(): return image().get_attribute('src')                       # a new address for each picture
    def said(): return find('.jp-OutputArea .widget-html')[0].text
    wait(lambda: image().get_property('naturalWidth') > 200 and '4 classes' in said(), 'no picture was drawn')
    last = source()

    def changed(what, words=''):
        nonlocal last
        wait(lambda: source() != last and image().get_property('naturalWidth') > 200 and words in said(),
             f'{what} changed nothing')
        last = source()

    def type_names(text):
        field = find('.jp-OutputArea textarea')[0]
        field.click()
        field.send_keys(Keys.CONTROL, 'a')
        field.send_keys(text)
        find('.jp-OutputArea button.mod-primary')[0].click()

    type_names('grass, red striped star')
    changed('other names', '2 classes')
    Select(find('.jp-OutputArea .widget-dropdown select')[0]).select_by_index(2)
    changed('another scene')
    page.actions().click_and_hold(find('.jp-OutputArea .noUi-handle')[0]).move_by_offset(-40, 0).release().perform()
    changed('the slider')
    Image.new('RGB', (60, 40), (40, 150, 50)).save(tmp_path/'mine.png')
    # no dialog of the system: the input is put where it can be reached
    page.browser.execute_script('HTMLInputElement.prototype.click = function() { document.body.appendChild(this) }')
    find('.jp-OutputArea .widget-upload')[0].click()
    find('body > input[type=file]')[0].send_keys(str(tmp_path/'mine.png'))
    changed('an upload', '60 x 40')
    assert Select(find('.jp-OutputArea .widget-dropdown select')[0]).first_selected_option.text == 'mine.png'
    type_names(' , ')
    wait(lambda: 'no class names' in said(), 'nothing was said of an empty field')
    assert source() == last                                             # and the last picture stays
    assert not find('.jp-OutputArea .jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]')
    page.browser.save_screenshot(str(tmp_path/'playground.png'))
