"""The same module in other words: names, order and layout change, behaviour doesn't.

`rewrite` is how bugs.py hides a fault: in a text where every function differs from the project's, a
diff points nowhere. It works on the syntax tree. Comments and docstrings go; functions and methods
change places; variables inside of functions get other names; products, comparisons and branches
are turned round; expressions are taken apart, from what Python evaluates first on. Results stay the
same to the bit. Functions, methods, attributes and parameters keep their names: tests are written
against these.
"""

import ast
import builtins
import random

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BEGIN, END = "FAULT_BEGINS", "FAULT_ENDS"
UNARY = ("sqrt", "exp", "log", "square", "abs")  # torch has them as functions too
TURNED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
TURNED |= {ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}
PARTIAL = ("inner", "first", "piece", "step_a", "partial_", "term", "base")
RESULT = ("outcome", "produced", "final_", "res", "made", "output")
SYNONYMS = """
eps prediction noise_hat e_hat|mean mu centre m_|std sigma spread_ s_|x z state latent|x_0 clean z0
alphas_bar abar survival cumulative|variance var_ sigma2|noise xi gauss draw|ratio r_ quotient rho
clipped bounded held|log_prob lp logp|log_probs lps logps|latents zs path_|i row a idx|k col b at
t time_ tt|timesteps ts times_|cond context_ text_emb|losses values_ per_pair|loss objective ell
prompts captions texts_|rewards scores_ r_all|reward score_ r_one|weights omega w_all|w omega_ wt
order sequence perm|samples members rows_|some part_ subset|start lo offset_|total count_ denom
pairs couples mask_|index ids which|images pics pixels_|picture pic img|pictures pics_ imgs
embeds vectors feats|embed vec feat|rng gen dice|name key_ label|names keys_ labels|now current
old previous_ before_|history past memory|size width n_each|shape dims form|n number_ m|T horizon
path where file_|config cfg conf|settings opts knobs|generator source_ gen_|entropy words digest
value val v_|values vals vs|line msg sentence_|found hits got|fits ok_ good|row entry_ r_i
rows table_ entries_|text string_ s_text|word token_ w_i|first head_ lead|last tail_ end_
betas steps_b rates|previous earlier p_t|state s0 seed_|signal carry gain|kept chosen_ left_
everyone all_of_them batch_|mine own_ these|mask valid use|cosine cos_ similarity|grad_norm gnorm g2
parameters params thetas|logged notes record_|outside beyond out_of|off_1 departure dev
by_step per_step along|head mlp regressor|chosen picked sel|updates rounds u_|passes laps reps
metrics stats numbers_|best top b_i|error problem err|named terms_ pairs_n|kind sort type_
"""


def synonyms():
    """{name: what it may be called instead}."""
    lines = SYNONYMS.replace("\n", "|").split("|")
    return {words[0]: words[1:] for words in map(str.split, lines) if words}


def parameters(function):
    """The names of its arguments, and of those of all functions in it."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            a = node.args
            found |= {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
            found |= {arg.arg for arg in (a.vararg, a.kwarg) if arg}
    return found


def rename(function, taken, dice):
    """Give the variables that it sets other names."""
    fixed, own = parameters(function), set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            fixed |= set(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    new, known = {}, synonyms()
    for name in sorted(own - fixed - {"_"}):
        others = known.get(name, [f"the_{name}", f"{name}_here", f"this_{name}"])
        free = [other for other in others if other not in taken | set(new.values())]
        new[name] = dice.choice(free or [f"{name}_x"])
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)


class Turn(ast.NodeTransformer):
    """Products, comparisons and branches the other way round, half of the time."""

    def __init__(self, dice):
        self.dice = dice

    def turns(self):
        return self.dice.random() < 0.6

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult) and self.turns():
            node.left, node.right = node.right, node.left
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        kind = type(node.ops[0])
        if len(node.ops) == 1 and kind in TURNED and self.turns():
            sides = (node.comparators[0], [TURNED[kind]()], [node.left])
            return ast.Compare(*sides)
        return node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        if self.turns():
            return ast.IfExp(opposite(node.test), node.orelse, node.body)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in UNARY
        if method and not node.args and not node.keywords and self.turns():
            torch = ast.Attribute(ast.Name("torch", ast.Load()), node.func.attr, ast.Load())
            return ast.Call(torch, [node.func.value], [])
        return node


def opposite(test):
    """not test."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(ast.Not(), test)


def earliest(node):
    """The part of an expression that Python evaluates first -> (its holder, field, place)."""
    fields = {ast.BinOp: "left", ast.UnaryOp: "operand", ast.Attribute: "value"}
    fields |= {ast.Subscript: "value", ast.Compare: "left", ast.Yield: "value", ast.IfExp: "test"}
    if type(node) in fields:
        return node, fields[type(node)], None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func, "value", None
    if isinstance(node, ast.Call) and node.args:
        return node, "args", 0
    if isinstance(node, (ast.Tuple, ast.List)) and node.elts:
        return node, "elts", 0
    return None


def take_apart(statement, dice, fresh):
    """`y = f(g(x)) + 1` -> `a = g(x)`, `y = f(a) + 1`, somewhere on the way to the first part."""
    places, node = [], statement.value
    while True:
        place = earliest(node)
        if not place:
            break
        holder, field, at = place
        node = getattr(holder, field) if at is None else getattr(holder, field)[at]
        plain = not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super")
        if isinstance(node, (ast.Call, ast.BinOp, ast.Subscript, ast.Compare)) and plain:
            places.append((place, node))
    if not places or dice.random() < 0.25:
        return [statement]
    (holder, field, at), node = dice.choice(places)
    name = fresh(PARTIAL)
    if at is None:
        setattr(holder, field, ast.Name(name, ast.Load()))
    else:
        getattr(holder, field)[at] = ast.Name(name, ast.Load())
    return [ast.Assign([ast.Name(name, ast.Store())], node), statement]


def pieces(statement, dice, fresh):
    """A simple statement as several."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
        target, values = statement.targets[0], statement.value.elts
        if isinstance(target, ast.Tuple) and all(isinstance(t, ast.Name) for t in target.elts):
            used = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
            if not used & {t.id for t in target.elts}:
                pairs = zip(target.elts, values, strict=True)
                return [ast.Assign([t], value) for t, value in pairs]
    if isinstance(statement, ast.Return) and statement.value and dice.random() < 0.6:
        if not isinstance(statement.value, (ast.Name, ast.Constant)):
            name = fresh(RESULT)
            first = ast.Assign([ast.Name(name, ast.Store())], statement.value)
            return [*take_apart(first, dice, fresh), ast.Return(ast.Name(name, ast.Load()))]
    if isinstance(statement, (ast.Assign, ast.Return, ast.Expr)) and statement.value:
        return take_apart(statement, dice, fresh)
    return [statement]


def reshape(body, dice, fresh):
    """A block of statements, in other words; a fault's own are put between two marks."""
    found = []
    for statement in body:
        faulty = getattr(statement, "faulty", False)
        if isinstance(statement, ast.If) and statement.orelse and dice.random() < 0.6:
            if not (len(statement.orelse) == 1 and isinstance(statement.orelse[0], ast.If)):
                statement.test = opposite(statement.test)
                statement.body, statement.orelse = statement.orelse, statement.body
        for field in ("body", "orelse", "finalbody"):
            if getattr(statement, field, None):
                setattr(statement, field, reshape(getattr(statement, field), dice, fresh))
        some = pieces(statement, dice, fresh)
        marks = [ast.Expr(ast.Name(mark, ast.Load())) for mark in (BEGIN, END)]
        found += [marks[0], *some, marks[1]] if faulty else some
    return found


def without_docstrings(tree):
    """Of a module, its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]


def shuffled(body, dice):
    """Functions among the other statements of a module, before the first one that needs them."""
    functions = [node for node in body if isinstance(node, FUNCTIONS)]
    rest = [node for node in body if not isinstance(node, FUNCTIONS)]
    first = 1 + max(
        n for n, node in enumerate(rest) if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    dice.shuffle(functions)
    for function in functions:
        needs = {n.id for n in ast.walk(function.args) if isinstance(n, ast.Name)}
        for decorator in function.decorator_list:
            needs |= {n.id for n in ast.walk(decorator) if isinstance(n, ast.Name)}
        least, most = first, len(rest)
        for place, node in enumerate(rest):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if needs & {getattr(node, "name", ""), *(names if set_names(node) & needs else ())}:
                least = max(least, place + 1)
            if not isinstance(node, ast.ClassDef) and function.name in names:
                most = min(most, place)
        rest.insert(dice.randint(least, max(least, most)), function)
    return rest


def set_names(node):
    """The names that a module's statement sets."""
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {n.id for n in stored if isinstance(n.ctx, ast.Store)}


def mark(tree, lines):
    """Mark the innermost statements that touch the lines [first, last] as faulty."""
    first, last = lines
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.lineno <= last and node.end_lineno >= first:
            inner = [n for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node]
            if not any(n.lineno <= last and n.end_lineno >= first for n in inner):
                node.faulty = True


def shuffle_methods(tree, dice):
    """Of each class; its other statements come first."""
    for node in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        methods = [inner for inner in node.body if isinstance(inner, FUNCTIONS)]
        dice.shuffle(methods)
        node.body = [inner for inner in node.body if not isinstance(inner, FUNCTIONS)] + methods


def rewrite(source, seed, lines=None):
    """A module in other words -> its text, (first, last) of where the statements of `lines` went.

    seed: which other words. lines: (first, last) in the source, or None.
    """
    dice, tree = random.Random(seed), ast.parse(source)
    if lines:
        mark(tree, lines)
    without_docstrings(tree)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {getattr(n, "name", "") or "" for n in ast.walk(tree)} | set(dir(builtins))
    outer = [node for node in tree.body if isinstance(node, FUNCTIONS)]
    for node in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        outer += [inner for inner in node.body if isinstance(inner, FUNCTIONS)]
    for function in outer:
        rename(function, names | parameters(function), dice)
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | parameters(function)

        def fresh(pool, used=used):
            free = [name for name in pool if name not in used | names]
            name = dice.choice(free) if free else f"{pool[0]}{len(used)}"
            used.add(name)
            return name

        turn = Turn(dice)
        function.body = reshape([turn.visit(node) for node in function.body], dice, fresh)
    shuffle_methods(tree, dice)
    tree.body = shuffled(tree.body, dice)
    return unmarked(ast.unparse(ast.fix_missing_locations(tree)))


def unmarked(text):
    """Take the marks out -> the text, (first, last) of the lines between them, or None."""
    kept, place = [], []
    for line in text.split("\n"):
        if line.strip() in (BEGIN, END):
            place.append(len(kept) + (line.strip() == BEGIN))
        else:
            kept.append(line)
    return "\n".join(kept) + "\n", (place[0], place[-1]) if place else None
