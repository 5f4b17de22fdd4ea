"""A pickle read as data: dictionaries, lists, numbers, text and tensors. Nothing in it is executed.

A pickle is a program for a machine with a stack and a memo. Python's own machine imports and calls
whatever the program names. The machine here has no instruction that does: a name stays a text, an
object becomes INERT, and a call is either one of the few functions that the caller allows, or
refused. Only a module in TorchScript, whose class is the file's own code, keeps its attributes. The
standard library's pickletools splits the bytes into instructions.

No value is hashed, compared or printed before it is known to be a text or a number. A list that
holds another list twice, which holds another one twice, and so on, is small in the file, but
visiting all of it would never end.
"""
import pickletools

from ...errors import TinyldmError

MOST_INSTRUCTIONS = 1 << 20     # a checkpoint has about 50 per tensor; a million need under 100 MB
MOST_ARGUMENTS = 8              # of a call
LONGEST_GLOBAL = 1000           # characters of the name of something to import
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Calls that training scripts leave in a checkpoint beside the weights. Nobody needs their results,
# so nothing is called and the result is INERT.
NOT_NEEDED = {
    "_codecs.encode", "__builtin__.set", "builtins.set", "__builtin__.frozenset",
    "builtins.frozenset", "collections.defaultdict",
    "copy_reg._reconstructor", "copyreg._reconstructor", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "torch.Size", "torch.device",
    *(f"torch.jit._pickle.{name}" for name in (         # lists and marks of TorchScript
        "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist",
        "restore_type_tag"))}
SCRIPT = "__torch__."           # how the classes of a TorchScript program begin
INERT = object()                # stands for every object; it ignores its state and its items


class Global(str):
    """The name of something that a pickle would import, "module.name". It is only this text."""


class ScriptModule:
    """A module in TorchScript. state: {name: a tensor, a ScriptModule, anything else}."""

    def __init__(self):
        self.state = {}


def unpickle(path, data, calls, persistent):
    """The object that the bytes of a pickle describe.

    calls: {"module.name": the function to call instead}. persistent: a function that turns the
    tuple by which a pickle refers to something outside itself into that thing. path: for messages.
    A dictionary keeps only the entries whose key is a text. A set becomes a list, an object INERT,
    a module in TorchScript a ScriptModule.
    Raises TinyldmError for a damaged pickle, for one that is too long, and for one that calls
    anything else, which the message names.
    """
    machine = Machine(path, calls, persistent)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count == MOST_INSTRUCTIONS:
                raise TinyldmError(f"{path}: its pickle has more than {MOST_INSTRUCTIONS} "
                                   "instructions, more than any checkpoint needs: use another file")
            machine.run(instruction.name, argument)
        return machine.stack.pop()
    except TinyldmError:
        raise
    except Exception as error:          # instructions that do not fit each other raise anything
        raise TinyldmError(f"{path}: its pickle is damaged ({type(error).__name__}: "
                           f"{str(error)[:80]!a}): get it again") from None


class Machine:
    """The stack, the heights that MARK remembers, and the memo."""

    def __init__(self, path, calls, persistent):
        self.path, self.calls, self.persistent = path, calls, persistent
        self.stack, self.marks, self.memo = [], [], {}

    def run(self, name, argument):
        """Run one instruction, named as in pickletools."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in LITERALS:
                stack.append(argument)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])

            # the stack and the memo
            case "MARK":
                self.marks.append(len(stack))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_marked()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])

            # containers
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(self.pop_marked())
            case "APPEND":
                self.add_items(self.pop(1))
            case "APPENDS" | "ADDITEMS":
                self.add_items(self.pop_marked())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self.pop_marked()))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self.pop_marked()
                stack.append({})
                self.set_items(items)
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_marked())

            # names, calls, objects
            case "GLOBAL":                              # argument: "module name"
                stack.append(Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, name = self.pop(2)
                if len(module) + len(name) > LONGEST_GLOBAL:    # joining joined names would double
                    raise ValueError("a name too long to import")
                stack.append(Global(".".join([module, name])))
            case "REDUCE":
                self.call(*self.pop(2))
            case "OBJ":
                function, *arguments = self.pop_marked()
                self.call(function, arguments)
            case "INST":
                self.call(Global(argument.replace(" ", ".")), self.pop_marked())
            case "NEWOBJ" | "NEWOBJ_EX":                # of a class and the arguments of __new__
                kind, *_ = self.pop(2 if name == "NEWOBJ" else 3)
                script = isinstance(kind, Global) and kind.startswith(SCRIPT)
                stack.append(ScriptModule() if script else INERT)
            case "BUILD":
                state = stack.pop()                     # any other object stays as it is
                if isinstance(stack[-1], ScriptModule) and isinstance(state, dict):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case _:
                raise TinyldmError(f"{self.path}: its pickle holds the instruction {name}, "
                                   "which no checkpoint needs: use another file")

    def pop(self, count):
        """The last `count` items of the stack, in the order in which they were pushed."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop_marked(self):
        """All items above the last mark."""
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def add_items(self, items):
        if self.stack[-1] is not INERT:
            self.stack[-1].extend(items)

    def set_items(self, items):
        """items: key, value, key, value ..."""
        if self.stack[-1] is not INERT:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    def call(self, function, arguments):
        known = isinstance(function, Global)
        if known and function in self.calls:
            self.stack.append(self.calls[function](*arguments[:MOST_ARGUMENTS]))
        elif known and function in NOT_NEEDED:
            self.stack.append(INERT)
        else:
            name = f"{function!a:.80}" if known else "an object"
            raise TinyldmError(f"{self.path}: its pickle calls {name}, which no weights need, so "
                               "nothing of it was run: use another file, best a safetensors one")
