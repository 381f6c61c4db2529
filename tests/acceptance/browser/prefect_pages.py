"""What a person does on Prefect's pages, by the words that are written there."""

import re

from playwright.sync_api import Locator, Page, TimeoutError, expect  # noqa: A004 (it is no builtin one)


class PrefectPages:
    def __init__(self, page: Page, address: str) -> None:
        """`address`: where the server answers, which by itself leads to the newest pages it has."""
        self.page, self._address = page, address

    def open(self, path: str = "") -> None:
        self._go(path, self.main)

    def _go(self, path: str, expected: Locator) -> None:
        self.page.goto(f"{self._address}/v2/{path}" if path else self._address)
        try:
            expected.wait_for(timeout=20_000)
        except TimeoutError:
            # On a machine that is busy its script may not have been loaded: then nothing is shown until somebody asks.
            self.page.reload()

    def log_in(self, password: str) -> None:
        """The pages ask for it wherever one comes from; what follows is the page that was asked for."""
        field = self.page.get_by_placeholder("admin:pass")
        self._go("deployments", field)
        field.fill(password)
        self.page.get_by_role("button", name="Login").click()
        expect(self.page.get_by_text("Logout", exact=True)).to_be_visible()

    @property
    def main(self) -> Locator:
        return self.page.get_by_role("main")

    def row(self, text: str) -> Locator:
        return self.page.get_by_role("row").filter(has_text=text)

    def open_deployment(self, flow: str) -> None:
        self.open("deployments")
        self.row(flow).get_by_role("link").first.click()
        expect(self.main.get_by_role("button", name="Run", exact=True)).to_be_visible()

    def open_run_form(self, flow: str) -> None:
        self.open_deployment(flow)
        self.main.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Custom run").click()

    def field(self, label: str) -> Locator:
        """Where a parameter of this label is filled in; those that may be left out are labelled so."""
        described = self.form.get_by_text(label, exact=True).or_(
            self.form.get_by_text(f"{label} (Optional)", exact=True)
        )
        return described.locator("xpath=following::fieldset[1]")

    @property
    def form(self) -> Locator:
        """What is filled in at the moment: a dialog's, where one is open."""
        dialog = self.page.get_by_role("dialog")
        return dialog.first if dialog.count() else self.main

    def fill(self, label: str, value: str) -> None:
        self.field(label).locator("input, textarea").fill(value)

    def fill_list(self, label: str, values: list[str]) -> None:
        field = self.field(label)
        for number, value in enumerate(values):
            field.get_by_role("button", name="Add item").click()
            field.get_by_role("textbox").nth(number).fill(value)

    def submit(self) -> None:
        """The form; what follows is the page of the run."""
        self.page.get_by_role("button", name="Submit").click()
        self.page.get_by_role("button", name="View run").click()

    def run(self, image: str, *command: str, name: str = "") -> None:
        """A container, by the form of `run-container-job`."""
        self.open_run_form("run-container-job")
        self.fill("Image", image)
        self.fill_list("Command", list(command))
        self.fill("Name", name)
        self.submit()

    def schedule(self, cron: str, timezone: str, image: str, *command: str, name: str) -> None:
        """A container by a schedule, in the form of `run-container-job` for one."""
        self.open_deployment("run-container-job")
        self.main.get_by_role("button", name="Schedule", exact=True).click()
        self.form.get_by_role("tab", name="Cron").click()
        self.form.get_by_label("Value", exact=True).fill(cron)
        self.form.get_by_label("Timezone").click()
        self.page.get_by_placeholder("Search").last.fill(timezone)
        self.page.get_by_role("option", name=timezone.replace("/", " / ")).first.click()
        self.fill("Image", image)
        self.fill_list("Command", list(command))
        self.fill("Name", name)
        self.form.get_by_role("button", name="Save").click()
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    def open_run(self, flow_run_id: object) -> None:
        self.open(f"runs/flow-run/{flow_run_id}")

    def open_runs(self, state: str = "") -> None:
        """All of the last week, or those in the state of this name."""
        self.open("runs")
        if state:
            self.main.get_by_role("button", name="All run states").click()
            self.page.get_by_role("menuitem", name=state, exact=True).click()
            self.page.keyboard.press("Escape")

    def listed(self, *texts: str) -> Locator:
        """The entries of a list of runs that have all of these in them."""
        entries = (
            self.main.get_by_role("tabpanel").get_by_role("listitem").filter(has=self.page.get_by_role("navigation"))
        )
        for text in texts:
            entries = entries.filter(has=self.page.get_by_text(text))
        return entries

    def open_listed(self, text: str) -> None:
        """The run's page; a click on what is on both pages would keep one on the list if it came before."""
        self.listed(text).get_by_role("link").last.click()
        expect(self.page).to_have_url(re.compile("/runs/flow-run/"))
        # The address changes before the page does; the list has no such tab.
        expect(self.main.get_by_role("tab", name="Subflow Runs")).to_be_visible()

    def expect_state(self, name: str) -> None:
        """Of the run whose page is shown; it looks again every few seconds."""
        expect(self.main.get_by_text(name, exact=True).first).to_be_visible()

    @property
    def log(self) -> Locator:
        return self.main.get_by_role("log")

    def log_line(self, text: str) -> Locator:
        return self.log.get_by_role("listitem").filter(has=self.page.get_by_text(text, exact=True))

    def expect_message(self, text: str) -> str:
        """What the run's state says, which has this in it."""
        self.main.get_by_role("tab", name="Details").click()
        message = self.main.get_by_text("State Message", exact=True).locator("xpath=following-sibling::*[1]")
        expect(message).to_contain_text(text)
        return message.inner_text()

    def choose(self, area: Locator, action: str) -> None:
        """What is behind the dots."""
        area.get_by_role("button", name="Open menu").click()
        self.page.get_by_role("menuitem", name=action, exact=True).click()

    def cancel_run(self) -> None:
        self.choose(self.main, "Cancel")
        self.page.get_by_role("alertdialog").get_by_role("button", name="Cancel Flow Run").click()

    def set_limit(self, tag: str, limit: int) -> None:
        self.open("concurrency-limits")
        row = self.row(f"tag:{tag}")
        self.choose(row, "Edit")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_label("Concurrency Limit").fill(str(limit))
        dialog.get_by_role("button", name="Update").click()
        expect(row.get_by_role("cell", name=str(limit), exact=True).first).to_be_visible()

    def switch_schedule(self, *, on: bool) -> None:
        """Of the deployment whose page is shown."""
        switch = self.page.get_by_role("switch", name="toggle Every")
        expect(switch).to_be_checked(checked=not on)
        switch.click()
        expect(switch).to_be_checked(checked=on)
