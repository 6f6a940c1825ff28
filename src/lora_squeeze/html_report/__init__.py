"""The page of `inspect --html`: one file that works offline."""

from lora_squeeze.html_report.page import check_target as check_target
from lora_squeeze.html_report.page import page_text as page_text
from lora_squeeze.html_report.page import write_page as write_page
