"""Plan files: a Plan from YAML or from flags, checked against the model and the machine.

    fields.py    YAML with line numbers
    drafts.py    what a plan file may say
    experts.py   the same of who has which experts
    resolve.py   together with a model: ranges, routes
    reader.py    all of that: `read_plan`
    writer.py    back to YAML
    even.py      plans from --tensor-parallel-size and the like; threads
    machine.py   what is here
    choose.py    file or flags: what runs
    table.py     the same for people

Knows nothing of how a plan is run, nor of what would make a good one.
"""

from shoal.plan_file.choose import Parallelism
from shoal.plan_file.even import device_share
from shoal.plan_file.reader import PlanFile, read_plan
from shoal.plan_file.table import plan_table
from shoal.plan_file.writer import dump_plan

__all__ = [
    "Parallelism",
    "PlanFile",
    "device_share",
    "dump_plan",
    "plan_table",
    "read_plan",
]
