"""Chapter 04: the loop, and what stands around it."""

from cifar_ft.training.checkpoint import RunDirectory
from cifar_ft.training.convolutions import speed_up
from cifar_ft.training.distributed import start_processes
from cifar_ft.training.estimate import estimate_seconds
from cifar_ft.training.faults import StopRequest, TrainingError
from cifar_ft.training.fit import fit, run_epoch
from cifar_ft.training.hardware import Plan, choose_plan, describe_machine, keep_memory, usable_cpus
from cifar_ft.training.loop import train_epoch, train_step
from cifar_ft.training.optim import lr_factor, make_optimizer, move_average, set_lr
from cifar_ft.training.probe import fit_head
from cifar_ft.training.replay import Replay, own_stream
from cifar_ft.training.run_files import new_run_dir, peak_memory_mb, stored_recipe
from cifar_ft.training.state import Training, prepare
