"""Archives in pages of one pool: their format, their layout, and writes into them."""

from pallas_kernels.paged.api import write_pages as write_pages
from pallas_kernels.paged.format import FORMATS as FORMATS
from pallas_kernels.paged.format import PageFormat as PageFormat
from pallas_kernels.paged.format import format_of as format_of
from pallas_kernels.paged.pages import Pages as Pages
