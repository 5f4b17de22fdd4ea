"""A pickle read as data: dictionaries, lists, numbers, text and tensors; nothing is executed.

A pickle is a program for a machine with a stack and a memo, and Python's own machine imports and
calls whatever the program names. This one has no instruction that does: a name stays a name, what
would be an object of it becomes INERT, and a call is made of a few functions given by the caller,
or refused. The program is taken apart by the standard library's pickletools, which reads no more
than there is. No value is hashed, compared or printed unless it is known to be a text or a number:
lists inside lists, each holding the next one twice, are small and yet endless to walk through.
"""
import pickletools

from ...errors import TinyldmError

MOST_INSTRUCTIONS = 1 << 20     # a checkpoint has some 50 a tensor; a million make 100 MB at most
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
            "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
# What training scripts leave in a checkpoint beside the weights: called, it would make a value
# that is of no use here, so nothing is called and the value is INERT.
OF_NO_USE = {
    "_codecs.encode", "__builtin__.set", "builtins.set", "__builtin__.frozenset",
    "builtins.frozenset", "collections.defaultdict",
    "copy_reg._reconstructor", "copyreg._reconstructor", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "torch.Size", "torch.device"}


class Global(str):
    """What a pickle would import: "module.name", and nothing more than this text."""


INERT = object()                # what an object becomes: it takes every state and keeps none
MOST_ARGUMENTS = 8              # of a call


def unpickle(path, data, calls, persistent):
    """The object that the bytes of a pickle describe.

    calls: {"module.name": the function that stands for it}; persistent: a function of the tuple
    that a pickle gives for what lies outside of it. path: for the errors. Of a dictionary only what
    has a text for a key is kept; a set is a list, an object INERT.
    Raises TinyldmError for a damaged pickle, for one that calls anything else, naming it, and for
    one that is too long.
    """
    machine = Machine(path, calls, persistent)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count == MOST_INSTRUCTIONS:
                raise TinyldmError(f"{path}: its pickle has more than {MOST_INSTRUCTIONS} "
                                   "instructions: no checkpoint needs as many")
            machine.run(instruction.name, argument)
        return machine.pop()
    except TinyldmError:
        raise
    except Exception as error:          # whatever instructions do that do not fit each other
        raise TinyldmError(f"{path}: its pickle is damaged ({type(error).__name__}: "
                           f"{str(error)[:80]!a}): get it again") from None


class Machine:
    """The stack, the heights that are marked in it, and the memo. A method an instruction."""

    def __init__(self, path, calls, persistent):
        self.path, self.calls, self.persistent = path, calls, persistent
        self.stack, self.marks, self.memo = [], [], {}

    def run(self, name, argument):
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in INSTRUCTIONS:
            INSTRUCTIONS[name](self, argument)
        else:
            raise TinyldmError(f"{self.path}: its pickle holds the instruction {name}, "
                               "which no checkpoint needs: use another file")

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        return self.stack.pop()

    def pop_marked(self):
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def ignore(self, argument):
        pass

    # ---- the stack and the memo -------------------------------------------------------------

    def mark(self, argument):
        self.marks.append(len(self.stack))

    def drop(self, argument):
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def drop_marked(self, argument):
        self.pop_marked()

    def duplicate(self, argument):
        self.push(self.stack[-1])

    def put(self, number):
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def get(self, number):
        self.push(self.memo[number])

    # ---- containers -------------------------------------------------------------------------

    def empty_list(self, argument):
        self.push([])

    def empty_dictionary(self, argument):
        self.push({})

    def sequence(self, argument):                       # a list, or a set that is one here
        self.push(self.pop_marked())

    def tuple(self, argument):
        self.push(tuple(self.pop_marked()))

    def short_tuple(self, length):
        items = [self.pop() for _ in range(length)]
        self.push(tuple(reversed(items)))

    def append(self, argument):
        self.add_items([self.pop()])

    def append_marked(self, argument):
        self.add_items(self.pop_marked())

    def add_items(self, items):
        if self.stack[-1] is not INERT:
            self.stack[-1].extend(items)

    def dictionary(self, argument):
        items = self.pop_marked()
        self.push({})
        self.set_items(items)

    def set_item(self, argument):
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_marked(self, argument):
        self.set_items(self.pop_marked())

    def set_items(self, items):
        if self.stack[-1] is not INERT:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    # ---- names, calls, objects --------------------------------------------------------------

    def name(self, argument):                           # "module name"
        self.push(Global(argument.replace(" ", ".")))

    def name_on_stack(self, argument):
        name, module = self.pop(), self.pop()
        self.push(Global(".".join([module, name])))

    def reduce(self, argument):
        arguments, function = self.pop(), self.pop()
        self.call(function, arguments)

    def object_of_marked(self, argument):
        function, *arguments = self.pop_marked()
        self.call(function, arguments)

    def object_of_name(self, argument):
        self.call(Global(argument.replace(" ", ".")), self.pop_marked())

    def call(self, function, arguments):
        known = isinstance(function, Global)
        if known and function in self.calls:
            self.push(self.calls[function](*arguments[:MOST_ARGUMENTS]))
        elif known and function in OF_NO_USE:
            self.push(INERT)
        else:
            name = f"{function!a:.80}" if known else "an object"
            raise TinyldmError(f"{self.path}: its pickle calls {name}, which no weights need, so "
                               "nothing of it was run: use another file, best a safetensors one")

    def new_object(self, argument):
        self.short_tuple(2)                             # a class, and what it would be given
        self.stack[-1] = INERT

    def new_object_with_names(self, argument):
        self.short_tuple(3)
        self.stack[-1] = INERT

    def set_state(self, argument):
        self.pop()                                      # the object stays as it is

    def outside(self, argument):
        self.push(self.persistent(self.pop()))


INSTRUCTIONS = {
    "PROTO": Machine.ignore, "FRAME": Machine.ignore, "STOP": Machine.ignore,
    "MARK": Machine.mark, "POP": Machine.drop, "POP_MARK": Machine.drop_marked,
    "DUP": Machine.duplicate,
    "PUT": Machine.put, "BINPUT": Machine.put, "LONG_BINPUT": Machine.put, "MEMOIZE": Machine.put,
    "GET": Machine.get, "BINGET": Machine.get, "LONG_BINGET": Machine.get,
    "EMPTY_LIST": Machine.empty_list, "EMPTY_SET": Machine.empty_list,
    "LIST": Machine.sequence, "FROZENSET": Machine.sequence,
    "APPEND": Machine.append, "APPENDS": Machine.append_marked, "ADDITEMS": Machine.append_marked,
    "EMPTY_TUPLE": lambda machine, _: machine.short_tuple(0),
    "TUPLE1": lambda machine, _: machine.short_tuple(1),
    "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3), "TUPLE": Machine.tuple,
    "EMPTY_DICT": Machine.empty_dictionary, "DICT": Machine.dictionary,
    "SETITEM": Machine.set_item, "SETITEMS": Machine.set_marked,
    "GLOBAL": Machine.name, "STACK_GLOBAL": Machine.name_on_stack,
    "REDUCE": Machine.reduce, "OBJ": Machine.object_of_marked, "INST": Machine.object_of_name,
    "NEWOBJ": Machine.new_object, "NEWOBJ_EX": Machine.new_object_with_names,
    "BUILD": Machine.set_state, "BINPERSID": Machine.outside,
}
