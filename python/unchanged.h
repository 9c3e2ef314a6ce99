// fasternet_runtime._unchanged: whether Python objects are still what they were. An accelerated network asks it before
// every call (fasternet_kernels/watch.py says what of a model is watched), over a thousand questions of a few
// nanoseconds each. It knows nothing of torch: what reads a tensor's version and address are arguments.
#pragma once

#include <Python.h>

#include <initializer_list>

namespace fasternet {

// A reference that is given back at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// The functions below return 1 for yes, 0 for no, -1 with a Python exception set. What `unchanged` takes is said where
// it is called, in python_unchanged of fasternet_kernels/watch.py.

// Whether dict[name] is `value`, or equal and of the same type; `absent` stands for no such key.
inline int same_item(PyObject* dict, PyObject* name, PyObject* value, PyObject* absent) {
  PyObject* const now = PyDict_GetItemWithError(dict, name);
  if (now == value) return 1;
  if (now == nullptr) return PyErr_Occurred() ? -1 : value == absent;
  if (value == absent || Py_TYPE(now) != Py_TYPE(value)) return 0;
  const Owned held(Py_NewRef(now));  // a comparison may run anything
  return PyObject_RichCompareBool(now, value, Py_EQ);
}

// Whether dict[name] is a dict without entries.
inline int empty_item(PyObject* dict, PyObject* name) {
  PyObject* const now = PyDict_GetItemWithError(dict, name);
  if (now == nullptr) return PyErr_Occurred() ? -1 : 0;
  return PyDict_Check(now) && PyDict_GET_SIZE(now) == 0;
}

// Whether dict[name] is a dict with the keys of `copy`, in its order, and the very objects of `copy`.
inline int same_contents(PyObject* dict, PyObject* name, PyObject* copy) {
  PyObject* const now = PyDict_GetItemWithError(dict, name);
  if (now == nullptr) return PyErr_Occurred() ? -1 : 0;
  if (!PyDict_Check(now) || PyDict_GET_SIZE(now) != PyDict_GET_SIZE(copy)) return 0;
  Py_ssize_t i = 0, j = 0;
  PyObject *key, *value, *old_key, *old_value;
  while (PyDict_Next(now, &i, &key, &value) && PyDict_Next(copy, &j, &old_key, &old_value)) {
    if (value != old_value) return 0;
    if (key == old_key) continue;
    if (!PyUnicode_Check(key) || !PyUnicode_Check(old_key) || PyUnicode_Compare(key, old_key) != 0) {
      return PyErr_Occurred() ? -1 : 0;
    }
  }
  return 1;
}

// Whether `number`, a new reference or null after an error, is `expected`.
inline int same_number(PyObject* number, PyObject* expected) {
  const Owned held(number);
  return number == nullptr ? -1 : PyObject_RichCompareBool(number, expected, Py_EQ);
}

inline PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 8) return PyErr_Format(PyExc_TypeError, "_unchanged takes 8 arguments, %zd given", n_args);
  PyObject *const modules = args[0], *const checks = args[1], *const tensors = args[2];
  PyObject *const absent = args[3], *const empty = args[4], *const contents = args[5];
  PyObject *const version = args[6], *const address = args[7];
  const descrgetfunc get_version = Py_TYPE(version)->tp_descr_get;
  for (PyObject* triples : {modules, checks, tensors}) {
    if (!PyTuple_Check(triples) || PyTuple_GET_SIZE(triples) % 3 != 0 || get_version == nullptr) {
      return PyErr_Format(PyExc_TypeError, "_unchanged: expected tuples of triples, and a descriptor");
    }
  }
  int same = 1;
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(modules); i += 3) {
    PyObject* const module = PyTuple_GET_ITEM(modules, i);
    same = reinterpret_cast<PyObject*>(Py_TYPE(module)) == PyTuple_GET_ITEM(modules, i + 1);
    if (same != 1) break;
    const Owned dict(PyObject_GenericGetDict(module, nullptr));
    same = dict.get() == nullptr ? -1 : dict.get() == PyTuple_GET_ITEM(modules, i + 2);
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(checks); i += 3) {
    PyObject *const dict = PyTuple_GET_ITEM(checks, i), *const name = PyTuple_GET_ITEM(checks, i + 1);
    PyObject* const expected = PyTuple_GET_ITEM(checks, i + 2);
    if (!PyDict_Check(dict)) return PyErr_Format(PyExc_TypeError, "_unchanged: expected a dict");
    if (expected == empty) {
      same = empty_item(dict, name);
    } else if (reinterpret_cast<PyObject*>(Py_TYPE(expected)) == contents && PyDict_Check(expected)) {
      same = same_contents(dict, name, expected);
    } else {
      same = same_item(dict, name, expected, absent);
    }
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(tensors); i += 3) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
    PyObject* const cls = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    same = same_number(get_version(version, tensor, cls), PyTuple_GET_ITEM(tensors, i + 1));
    if (same != 1) break;
    same = same_number(PyObject_Vectorcall(address, &tensor, 1, nullptr), PyTuple_GET_ITEM(tensors, i + 2));
  }
  if (same < 0) return nullptr;
  return PyBool_FromLong(same);
}

}  // namespace fasternet
