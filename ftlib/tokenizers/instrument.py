"""Puts calls to the limits and to the trail into a parsed template. What it writes stays the same."""

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

PREFIX = "ftlib_"  # of the environment's attributes that are called; no template can name them


def instrument(tree: nodes.Template) -> nodes.Template:
    """The tree with: `begin`, `turn`, `end` around and in loops; `assigned` behind assignments in them; `tick` in their
    conditions; `write` around all output; `weigh` around literals and joins that could grow."""
    found = _Instrument().visit(tree)
    found.set_environment(tree.environment)
    return found


class _Instrument(NodeTransformer):
    def __init__(self) -> None:
        self._loops = 0  # around the node, within its macro

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self._loops += 1
        self.generic_visit(node)
        self._loops -= 1
        if node.test is not None:
            node.test = nodes.And(_call("tick", node), node.test, lineno=node.lineno)
        if node.recursive:  # it calls itself in the midst of a turn: nobody's
            node.body.insert(0, _statement("tick", node))
            return [node]
        values = [nodes.Name(name, "load", lineno=node.lineno) for name in _names(node.target)]
        node.body.insert(0, _statement("turn", node, *values))
        return [_statement("begin", node), node, _statement("end", node)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._own_scope(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._own_scope(node)

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        if not self._loops or not isinstance(node.target, nodes.Name):
            return node
        return [node, _statement("assigned", node, nodes.Name(node.target.name, "load", lineno=node.lineno))]

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_call("write", child, _constant(child)) for child in node.nodes]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weighed(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weighed(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weighed(node, [pair.value for pair in node.items])

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._weighed(node, node.nodes)

    def _weighed(self, node: nodes.Expr, parts: list[nodes.Expr]) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(part, nodes.Const) for part in parts) else _call("weigh", node, node)

    def _own_scope(self, node: nodes.Node) -> nodes.Node:
        outer, self._loops = self._loops, 0
        self.generic_visit(node)
        self._loops = outer
        return node


def _names(target: nodes.Node) -> list[str]:
    """Names that a loop's target sets."""
    found = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return [name.name for name in found]


def _constant(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


def _call(name: str, at: nodes.Node, *arguments: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(PREFIX + name, lineno=at.lineno)
    return nodes.Call(function, list(arguments), [], None, None, lineno=at.lineno)


def _statement(name: str, at: nodes.Node, *arguments: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(_call(name, at, *arguments), lineno=at.lineno)
