// The Python module of all functions of csrc that tests call one by one: what pybind11 takes to compile, it takes once.
#include "common.cpp"
#include "hopper_maps.cpp"
#include "maps.cpp"

PYBIND11_MODULE(host, m) {
  common::define(m.def_submodule("common"));
  hopper_maps::define(m.def_submodule("hopper_maps"));
  maps::define(m.def_submodule("maps"));
}
