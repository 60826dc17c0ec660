"""The tables of the documents are what measurements and settings say."""

import pytest

from benchmarks import tables


def test_tables_are_up_to_date(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_default_comes_from_the_configuration():
    page = (
        "<!-- table: settings ofp -->\n| setting | default | meaning |\n| --- | --- | --- |\n| `warm_start` | 9 | w |\n"
    )
    assert "| `warm_start` | 0.0 | w |" in tables.renewed(page + "<!-- end -->")


def test_a_setting_that_is_gone_is_named():
    table = "| setting | default | meaning |\n| --- | --- | --- |\n| `schedule_steps` | | |\n"
    with pytest.raises(ValueError, match="ofp has no setting `schedule_steps`"):
        tables.settings("ofp", table)
