"""The page in a browser: every op opened, every error planted, nothing on the console."""

import shutil

import pytest

from gptjax.explore.page import page

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs an installed Chromium")
    with playwright.sync_playwright() as drive:
        # Its sandbox does not run as root
        found = drive.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(shown, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page("title", "A heading", shown.scene), "utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser, address, request):
    """(the page, what it said on the console and asked the network for)."""
    size, scheme = getattr(request, "param", ("desktop", "light"))
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda asked: asked.url == address or said.append(asked.url))
    tab.goto(address)
    yield tab, said
    assert said == []
    context.close()


EVERYWHERE = [("desktop", "light"), ("phone", "dark")]


@pytest.mark.parametrize("opened", EVERYWHERE, indirect=True, ids="-".join)
def test_every_op_opens_and_closes(opened, shown):
    tab, _ = opened
    assert tab.locator(".chip").count() == len(shown.scene["nodes"])
    for chip in [*tab.locator(".chip").all(), *tab.locator("[data-block]").all()]:
        chip.click()
        assert tab.locator("#op").is_visible()
        assert tab.locator("#op-body .equation p").count()
        assert tab.locator("#op-body pre.code").count()
        assert tab.locator("#op-body figure canvas").count()
        tab.keyboard.press("Escape")
        assert not tab.locator("#op").is_visible()
        assert chip.evaluate("it => it === document.activeElement")


@pytest.mark.parametrize("opened", EVERYWHERE, indirect=True, ids="-".join)
def test_every_error_is_planted_and_mended(opened, shown):
    tab, _ = opened
    for fault in shown.scene["faults"]:
        tab.locator(f'#faults input[value="{fault["id"]}"]').check()
        assert fault["verdict"] in tab.locator("#verdict").inner_text()
        assert tab.locator("#heat td.wrong").count() == fault["wrong"]
        assert tab.locator(".chip.blamed").count() == (fault["blamed"] is not None)
        assert fault["breaks"] in tab.locator("#planted").inner_text()
    tab.locator("#mend").click()
    assert not tab.locator("#planted").is_visible()
    assert tab.locator("#heat td.wrong, .chip.hurt, .chip.blamed").count() == 0
    assert tab.locator('#faults input[value="none"]').is_checked()


@pytest.mark.parametrize("opened", EVERYWHERE, indirect=True, ids="-".join)
def test_contrast_labels_and_roles_are_right(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
    tab, _ = opened
    for state in ("plain", "planted", "opened"):
        if state == "planted":
            tab.locator("#faults input").nth(5).check()
        if state == "opened":
            tab.locator(".chip").nth(6).click()
        found = axe.Axe().run(tab).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == [], state


@pytest.mark.parametrize("opened", EVERYWHERE, indirect=True, ids="-".join)
def test_nothing_is_wider_than_the_screen(opened):
    tab, _ = opened
    for _ in range(2):
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.locator("#faults input").last.check()


def test_it_is_used_by_keyboard_alone(opened, shown):
    tab, _ = opened
    tab.locator(".chip").first.focus()
    tab.keyboard.press("Enter")
    titles = [tab.locator("#op-title").inner_text()]
    for _ in shown.scene["nodes"][1:3]:
        tab.keyboard.press("ArrowRight")
        titles.append(tab.locator("#op-title").inner_text())
    assert titles[:2] == ["embedding wte", "embedding wpe"]
    assert titles[2] == "Layer 0"
    tab.keyboard.press("Escape")
    tab.locator("#faults input").first.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#planted").is_visible()


def test_the_theme_is_the_systems_until_it_is_chosen(opened):
    tab, _ = opened
    theme = "document.documentElement.dataset.theme"
    assert tab.evaluate(theme) == "light"
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{theme} == 'dark'")
    tab.locator("#theme").click()
    assert tab.evaluate(theme) == "light"
    tab.emulate_media(color_scheme="light")
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(theme) == "light"
