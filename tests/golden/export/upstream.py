"""Load single source files of an engine, with everything around them replaced by shells.

The engines cannot be installed beside s2quant (each wants a torch and a transformers of its own), and what is asked of
them here, names, settings and where a tensor is copied to, needs no GPU and no kernel. `Shells` is an import hook:
modules listed as `real` come from the folder, every other module below the given packages is a shell whose attributes
are classes that do nothing. `given` holds the few attributes that must do something.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import torch


class AnyType(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return shell(name)


class Shell(metaclass=AnyType):
    """Takes any call; used as a decorator it gives back what it decorates; it is false."""

    def __new__(cls, *arguments, **keywords):
        if len(arguments) == 1 and callable(arguments[0]) and not keywords:
            return arguments[0]
        return object.__new__(cls)

    def __init__(self, *arguments, **keywords):
        pass

    def __init_subclass__(cls, **keywords):
        pass

    def __class_getitem__(cls, item):
        return cls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return shell(name)

    def __call__(self, *arguments, **keywords):
        return Shell(*arguments, **keywords)

    def __bool__(self):
        return False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def shell(name):
    return AnyType(name, (Shell,), {})


class ShellModule(types.ModuleType):
    """A module that has every attribute."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = shell(name)
        setattr(self, name, value)
        return value


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The import hook.

    `folders` maps a top package to the folder that holds it; `real` names the modules taken from there; `given` maps
    "module.attribute" to a value that the shell of the module gets.
    """

    def __init__(self, folders, real, given):
        self.folders, self.real, self.given = folders, real, given

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.folders:
            return None
        if name in self.real:
            file = self.folders[top].joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = ShellModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        for key, value in self.given.items():
            owner, _, name = key.rpartition(".")
            if owner == module.__name__:
                setattr(module, name, value)

    def __enter__(self):
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *error):
        """Forget the modules, so that another version can be loaded in the same process."""
        sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name.partition(".")[0] in self.folders]:
            del sys.modules[name]


class Sized(torch.nn.Module):
    """Stands for a norm or an embedding: it has a weight of the given sizes and nothing else."""

    def __init__(self, *sizes, **keywords):
        super().__init__()
        sizes = [size for size in sizes if isinstance(size, int)]
        self.weight = torch.nn.Parameter(torch.full(sizes, float("nan"), dtype=torch.bfloat16), requires_grad=False)


class Pluggable(torch.nn.Module):
    """Stands for vLLM's PluggableLayer, which picks a replacement of a layer by platform."""

    @classmethod
    def register(cls, name):
        return lambda layer: layer


class Capability:
    """Compute capability 9.0."""

    def to_int(self):
        return 90

    def __getitem__(self, index):
        return (9, 0)[index]


class Platform(Shell):
    """A GPU of compute capability 9.0, as far as configurations ask."""

    def is_cuda(self):
        return True

    def is_cuda_alike(self):
        return True

    def get_device_capability(self):
        return Capability()

    def has_device_capability(self, capability):
        return capability <= 90
