package policy

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

// decoder turns YAML into a message. It knows no field: it follows the
// message's descriptor.
type decoder struct {
	report
	unread map[string]bool // paths of what could not be read, and of all around it
}

func (d *decoder) message(n *yaml.Node, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	if !isA(yaml.MappingNode, n) {
		d.refuse(n, "a mapping with "+strings.Join(fieldNames(fields), ", "))
		return
	}
	first := make([]*yaml.Node, fields.Len())
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		var field protoreflect.FieldDescriptor
		if isA(yaml.ScalarNode, key) {
			field = fields.ByName(protoreflect.Name(key.Value))
		}
		if field == nil {
			d.unknown(key, fieldNames(fields))
			continue
		}
		if once := first[field.Index()]; once != nil {
			d.fail(key, "found %s twice, first at %d:%d, allowed once", field.Name(), once.Line, once.Column)
			continue
		}
		first[field.Index()] = key
		d.in(string(field.Name()), func() { d.field(value, m, field) })
	}
}

func (d *decoder) field(n *yaml.Node, m protoreflect.Message, field protoreflect.FieldDescriptor) {
	if !field.IsList() {
		if v := d.value(n, m.NewField(field), field); v.IsValid() {
			m.Set(field, v)
		}
		return
	}
	if !isA(yaml.SequenceNode, n) {
		d.refuse(n, "a list")
		return
	}
	list := m.Mutable(field).List()
	for i, item := range n.Content {
		d.item(i, func() {
			v := d.value(item, list.NewElement(), field)
			if !v.IsValid() {
				v = list.NewElement() // the next items must keep their index
			}
			list.Append(v)
		})
	}
}

// value reads one value, or item of a list, into v, a new one of its type. The
// result is invalid if it was refused.
func (d *decoder) value(n *yaml.Node, v protoreflect.Value, field protoreflect.FieldDescriptor) protoreflect.Value {
	scalar, allowed := isA(yaml.ScalarNode, n), ""
	switch field.Kind() {
	case protoreflect.MessageKind:
		if field.Message().FullName() != "google.protobuf.Duration" {
			d.message(n, v.Message())
			return v
		}
		allowed = "a duration with a unit, such as 50ms, 1.5s or 2h, below 290 years"
		if t, ok := duration(n.Value); scalar && ok {
			return protoreflect.ValueOfMessage(durationpb.New(t).ProtoReflect())
		}
	case protoreflect.EnumKind:
		values := field.Enum().Values()
		names := enumNames(values)
		allowed = strings.Join(names[1:], ", ")
		for i, name := range names {
			if scalar && (strings.EqualFold(n.Value, name) || strings.EqualFold(n.Value, string(values.Get(i).Name()))) {
				return protoreflect.ValueOfEnum(values.Get(i).Number())
			}
		}
	case protoreflect.StringKind:
		allowed = "a string, in quotes if it looks like something else"
		if scalar && n.Tag == "!!str" {
			return protoreflect.ValueOfString(n.Value)
		}
	case protoreflect.BoolKind:
		allowed = "true or false (yes, no, on and off are strings)"
		if b, ok := literal[bool](n); scalar && ok {
			return protoreflect.ValueOfBool(b)
		}
	case protoreflect.Uint32Kind:
		allowed = "a whole number without quotes, in digits, at most 4294967295"
		if i, ok := literal[uint32](n); scalar && ok {
			return protoreflect.ValueOfUint32(i)
		}
	case protoreflect.DoubleKind:
		allowed = "a number without quotes, such as 100 or 0.5"
		if f, ok := literal[float64](n); scalar && ok {
			return protoreflect.ValueOfFloat64(f)
		}
	}
	d.refuse(n, allowed)
	return protoreflect.Value{}
}

// literal reads a boolean or number as JSON writes it, which leaves out what
// YAML's versions disagree about: 010, 0x10, 1_000, .inf, yes.
func literal[T bool | uint32 | float64](n *yaml.Node) (v T, ok bool) {
	ok = n.Style == 0 && !isNull(n) && json.Unmarshal([]byte(n.Value), &v) == nil
	return v, ok
}

// duration reads Go's notation, of which protobuf's is a part. 0 needs a unit
// too, and what is too short for a nanosecond must not become 0.
func duration(s string) (time.Duration, bool) {
	d, err := time.ParseDuration(s)
	if err != nil || strings.HasSuffix(s, "0") || d == 0 && strings.ContainsAny(s, "123456789") {
		return 0, false
	}
	return d, true
}

func (d *decoder) unknown(key *yaml.Node, names []string) {
	what := found(key)
	if isA(yaml.ScalarNode, key) && key.Tag != mergeTag {
		what = fmt.Sprintf("unknown field %s, nearest is %s", quoted(key.Value), nearest(key.Value, names))
	}
	d.fail(key, "found %s, allowed %s", what, strings.Join(names, ", "))
	d.notRead()
}

// refuse records that the value could not be read.
func (d *decoder) refuse(n *yaml.Node, allowed string) {
	d.fail(n, "found %s, allowed %s", found(n), allowed)
	d.notRead()
}

// notRead notes that a part of the policy, here, could not be read.
func (d *decoder) notRead() {
	for path := string(d.path); !d.unread[path]; path = parent(path) {
		d.unread[path] = true
	}
}

func (d *decoder) fail(n *yaml.Node, format string, args ...any) {
	d.mistakes = append(d.mistakes, mistake{
		path: string(d.path), line: n.Line, col: n.Column, text: fmt.Sprintf(format, args...),
	})
}

const mergeTag = "!!merge"

func isA(kind yaml.Kind, n *yaml.Node) bool {
	return n.Kind == kind && n.Anchor == "" && n.Style&yaml.TaggedStyle == 0
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Tag == "!!null"
}

// found says what a node is.
func found(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.AliasNode:
		return "an alias (of anchor " + quoted(n.Value) + ")"
	case n.Anchor != "":
		return "an anchor (" + quoted(n.Anchor) + ")"
	case n.Style&yaml.TaggedStyle != 0:
		return "a tag (" + quoted(n.Tag) + ")"
	case n.Tag == mergeTag:
		return "a merge key (<<)"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "null"
	case n.Style == 0 && printable(n.Value):
		return short(n.Value)
	}
	return quoted(n.Value)
}

func fieldNames(fields protoreflect.FieldDescriptors) []string {
	names := make([]string, fields.Len())
	for i := range names {
		names[i] = string(fields.Get(i).Name())
	}
	return names
}

// enumNames are an enum's names without its own ("token_bucket"); the first is
// "unspecified".
func enumNames(values protoreflect.EnumValueDescriptors) []string {
	prefix := strings.TrimSuffix(string(values.Get(0).Name()), "UNSPECIFIED")
	names := make([]string, values.Len())
	for i := range names {
		names[i] = strings.ToLower(strings.TrimPrefix(string(values.Get(i).Name()), prefix))
	}
	return names
}

// position finds a field in the file: the value, or what there is of the way
// to it.
func position(n *yaml.Node, path string) (line, col int) {
	for _, step := range strings.FieldsFunc(path, func(r rune) bool { return strings.ContainsRune(".[]", r) }) {
		child := n
		if i, err := strconv.Atoi(step); err == nil {
			child = n.Content[i]
		} else {
			for i := 0; i < len(n.Content); i += 2 {
				if key := n.Content[i]; isA(yaml.ScalarNode, key) && key.Value == step {
					child = n.Content[i+1]
					break
				}
			}
		}
		if child == n {
			break
		}
		n = child
	}
	return n.Line, n.Column
}
