// fasternet_runtime._unchanged: whether Python objects are still what they were. An accelerated network asks it before
// every call (fasternet_kernels/watch.py says what of a model is watched), some 1500 questions of a few nanoseconds
// each. It knows nothing of torch: what reads a tensor's version and address are arguments.
#pragma once

#include <Python.h>

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

// The functions below return 1 for yes, 0 for no, -1 with a Python exception set.

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
  PyObject *const modules = args[0], *const items = args[1], *const hooks = args[2], *const contents = args[3];
  PyObject *const tensors = args[4], *const absent = args[5], *const version = args[6], *const address = args[7];
  const descrgetfunc get_version = Py_TYPE(version)->tp_descr_get;
  const Py_ssize_t group[] = {3, 3, 2, 3, 3};
  for (int i = 0; i < 5; ++i) {
    if (!PyTuple_Check(args[i]) || PyTuple_GET_SIZE(args[i]) % group[i] != 0 || get_version == nullptr) {
      return PyErr_Format(PyExc_TypeError, "_unchanged: argument %d is not what it must be", i);
    }
  }
  const auto at = [](PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); };
  const auto is_dict = [](PyObject* object) {
    if (PyDict_Check(object)) return true;
    PyErr_SetString(PyExc_TypeError, "_unchanged: expected a dict");
    return false;
  };
  int same = 1;
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(modules); i += 3) {
    same = reinterpret_cast<PyObject*>(Py_TYPE(at(modules, i))) == at(modules, i + 1);
    if (same != 1) break;
    const Owned dict(PyObject_GenericGetDict(at(modules, i), nullptr));
    same = dict.get() == nullptr ? -1 : dict.get() == at(modules, i + 2);
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(items); i += 3) {
    same = is_dict(at(items, i)) ? same_item(at(items, i), at(items, i + 1), at(items, i + 2), absent) : -1;
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(hooks); i += 2) {
    same = is_dict(at(hooks, i)) ? empty_item(at(hooks, i), at(hooks, i + 1)) : -1;
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(contents); i += 3) {
    const bool dicts = is_dict(at(contents, i)) && is_dict(at(contents, i + 2));
    same = dicts ? same_contents(at(contents, i), at(contents, i + 1), at(contents, i + 2)) : -1;
  }
  for (Py_ssize_t i = 0; same == 1 && i < PyTuple_GET_SIZE(tensors); i += 3) {
    PyObject* const tensor = at(tensors, i);
    same = same_number(get_version(version, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))), at(tensors, i + 1));
    if (same == 1) same = same_number(PyObject_Vectorcall(address, &tensor, 1, nullptr), at(tensors, i + 2));
  }
  if (same < 0) return nullptr;
  return PyBool_FromLong(same);
}

}  // namespace fasternet
