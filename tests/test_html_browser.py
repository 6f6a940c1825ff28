"""The page in a real browser: sliders, tables, themes, widths; nothing leaves the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_cases import EVIL, RANK, chromium, flat_folder, held, layered_folder
from playwright.sync_api import Browser, Page, Route

import lora_squeeze
from lora_squeeze.html_report import write_page
from lora_squeeze.servers import SERVERS

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layered")
    report = lora_squeeze.inspect(lora_squeeze.load(layered_folder(folder / "in")), rank=8, allocate="global")
    write_page(report, folder / "page.html", name="my adapter")
    return folder / "page.html"


@pytest.fixture(scope="module")
def data(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = held(file.read_text(encoding="utf-8"))
    return found


class Visit:
    """An open page, and all that it said and asked for."""

    def __init__(self, browser: Browser, file: Path, width: int = 1200, scheme: Any = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.context.route("**/*", lambda route: self._only_file(route, file))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-drawn]")

    def _only_file(self, route: Route, file: Path) -> None:
        route.continue_() if route.request.url == file.as_uri() else route.abort()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def visit(browser: Browser, file: Path) -> Iterator[Visit]:
    with Visit(browser, file) as found:
        yield found


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def check_choice(visit: Visit, box: str, point: dict[str, Any]) -> None:
    """What one box shows is one point of the JSON."""
    shown = [visit.text(f"{box} .{name}") for name in ("energy", "mean", "least")]
    assert shown == [percent(point[key]) for key in ("energy", "mean_energy", "min_energy")]
    assert visit.text(f"{box} .bytes").startswith(f"{point['bytes']:,} bytes (")


def test_the_rank_slider_shows_energy_bytes_and_servers_at_its_rank(visit: Visit, data: dict[str, Any]) -> None:
    slider = visit.page.locator("#by-rank input")
    assert visit.text("#by-rank .rank") == str(data["recommended_rank"]), "it starts at the recommendation"
    check_choice(visit, "#by-rank", data["curve"][data["recommended_rank"] - 1])
    servers = {1: "fits the default limit of 16", 2: "fits the default limit of 16", RANK: "needs --max-lora-rank 64"}
    for keys, rank in ((["Home"], 1), (["ArrowRight"], 2), (["End"], RANK), (["ArrowLeft"] * 3, RANK - 3)):
        for key in keys:
            slider.press(key)
        assert visit.text("#by-rank .rank") == str(rank)
        check_choice(visit, "#by-rank", data["curve"][rank - 1])
        lines = visit.page.locator("#by-rank .servers li").all_inner_texts()
        assert len(lines) == len(SERVERS) and servers.get(rank, "needs --max-lora-rank 64") in lines[0]
        assert visit.text("#by-rank .call").endswith(f"--rank {rank}")
        line = visit.page.evaluate("document.getElementById('chart-energy').layout.shapes[0].x0")
        assert line == rank, "the chart marks the same rank"


def test_the_size_slider_shows_the_best_ranks_for_a_size(visit: Visit, data: dict[str, Any]) -> None:
    slider = visit.page.locator("#by-size input")
    slider.press("Home")
    for i, point in enumerate(data["best_curve"]):
        if i:
            slider.press("ArrowRight")
        check_choice(visit, "#by-size", point)
        assert visit.text("#by-size .largest") == str(point["largest_rank"])
        assert visit.text("#by-size .call").endswith(f"--rank {point['rank']} --allocate global")


def test_the_recommendation_and_the_plan_are_in_words(visit: Visit, data: dict[str, Any]) -> None:
    words = visit.text("#recommendation")
    assert words.startswith(f"Rank {data['recommended_rank']} (") and "keeps 95 % of the energy on average" in words
    low, high = min(data["plan"]["ranks"].values()), max(data["plan"]["ranks"].values())
    assert f"Plan for rank 8, allocate global: ranks {low}–{high}, {percent(data['energy'])} of the energy" in words


def names(visit: Visit) -> list[str]:
    return visit.page.locator("#modules tbody td:first-child").all_inner_texts()


def test_the_table_is_sorted_by_the_column_that_is_clicked(visit: Visit, data: dict[str, Any]) -> None:
    assert names(visit) == [row["name"] for row in data["modules"]]
    by_rank = [row["name"] for row in sorted(data["modules"], key=lambda row: row["entropy_rank"])]
    heading = visit.page.locator("#modules th", has_text="entropy")
    for expected, direction in ((by_rank[::-1], "descending"), (by_rank, "ascending")):
        heading.get_by_role("button").click()
        assert names(visit) == expected and heading.get_attribute("aria-sort") == direction
    visit.page.locator("#modules th", has_text="module").get_by_role("button").click()
    layers = [int(name.split(".")[2]) for name in names(visit) if name.startswith("model.layers")]
    assert layers == sorted(layers) and 10 in layers, "numbers in names count as numbers"
    assert heading.get_attribute("aria-sort") is None


def test_a_hostile_name_is_shown_as_text(visit: Visit) -> None:
    assert any(EVIL in name for name in names(visit))
    assert visit.page.locator("img").count() == 0 and visit.page.title() == "my adapter: which rank?"


def test_the_charts_are_drawn(visit: Visit) -> None:
    assert visit.page.locator("#chart-ranks .hm image").count() == 1
    assert visit.page.locator("#chart-energy .scatterlayer .trace").count() > 2
    assert visit.page.locator("#chart-others .barlayer .trace").count() == 1


def test_without_layers_there_are_bars(browser: Browser, tmp_path: Path) -> None:
    write_page(lora_squeeze.load(flat_folder(tmp_path / "in")).report, tmp_path / "page.html", name="flat")
    with Visit(browser, tmp_path / "page.html") as visit:
        assert visit.page.locator("#chart-ranks .barlayer .point").count() == 2
        assert visit.page.locator("#chart-ranks .ytick text").all_text_contents() == ["<b>first</b>", "<b>second</b>"]
        assert visit.said == []


@pytest.fixture(scope="module")
def phone(browser: Browser, file: Path) -> Iterator[Visit]:
    with Visit(browser, file, 360, "dark") as found:
        yield found


def test_on_a_phone_only_the_tables_scroll_sideways(phone: Visit) -> None:
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = phone.page.evaluate("[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth, b.clientWidth])")
    assert all(inside > outside for inside, outside in boxes) and len(boxes) == 2
    for chart in phone.page.locator(".chart svg.main-svg").all():
        box = chart.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_dark_and_light_differ_and_follow_the_system(visit: Visit, phone: Visit) -> None:
    def colours(visit: Visit) -> list[str]:
        ground = "getComputedStyle(document.body).backgroundColor"
        chart = "getComputedStyle(document.querySelector('#chart-energy .xtick text')).fill"
        return [visit.page.evaluate(ground), visit.page.evaluate(chart)]

    light, dark = colours(visit), colours(phone)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    drawn = phone.page.get_attribute("body", "data-drawn")
    phone.page.emulate_media(color_scheme="light")
    phone.page.wait_for_selector(f"body:not([data-drawn='{drawn}'])")
    assert colours(phone) == light


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(visit: Visit, phone: Visit, file: Path) -> None:
    """After all that the tests before have done with the pages."""
    for found in (visit, phone):
        assert found.said == [] and found.asked == [file.as_uri()]
